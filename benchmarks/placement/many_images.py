"""Makes the data of configs/many-images.yaml: samples of 32 pictures of 32 x 32 pixels and a line of text.

python -m benchmarks.placement.many_images [--out runs/many-images-data] [--samples 16] [--pictures 32]
    [--side 32] [--text 0]
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from benchmarks import common


def picture(rng: np.random.Generator, side: int) -> bytes:
    """Smooth random grey levels: what is on it does not matter to a timing."""
    small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/many-images-data"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--text", type=int, default=0, help="bytes of text beside a line (default 0)")
    parser.add_argument("--side", type=int, default=32, help="of a picture, in pixels (default 32)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    path = args.out / "pictures-000000.tar"
    with TarWriter(str(path), mtime=0, format=tarfile.USTAR_FORMAT) as tar:
        for k in range(args.samples):
            names = [f"img{i}.png" for i in range(args.pictures)]
            segments: list[dict[str, str]] = [{"vision": name} for name in names]
            segments.append({"text": f"{args.pictures} pictures, brightness {rng.integers(10)}"})
            if args.text:
                segments.append({"text": " ".join(map(str, rng.integers(10, 99, -(-args.text // 3))))})
            sample: dict[str, object] = {name: picture(rng, args.side) for name in names}
            sample |= {"__key__": f"p{k:04d}", "json": json.dumps({"segments": segments}).encode()}
            tar.write(sample)
    print(path)


if __name__ == "__main__":
    main()
