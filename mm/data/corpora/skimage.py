"""Pictures of scikit-image: two crops, how light each is, and whether they are of one picture.

Text: "light 3 and 7, same picture". All that is learned can be told from the pixels of pictures that were
never seen: the lightness is measured, and crops of one picture share colours and texture. The held-out
crops are of pictures that training has no part of.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mm.data.corpora.pictures import opened, png
from mm.data.corpora.progress import shown
from mm.data.corpora.shards import Made, WrittenSample, sample, write_shards
from mm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32  # pixels of a crop in a shard
CROP = (64, 160)  # pixels of its side in the picture: from, to
LEVELS = 10  # of lightness
SAMPLES = {"train": 2400, "eval": 240}
# Licences as scikit-image 0.26.0 states them (skimage/data/_fetchers.py); pictures without one are not used.
LICENCES: Mapping[str, str] = {
    "astronaut.png": "NASA, public domain",
    "brick.png": "CC0",
    "camera.png": "CC0, Lav Varshney",
    "cell.png": "CC0",
    "chelsea.png": "CC0, Stefan van der Walt",
    "clock_motion.png": "public domain, Stefan van der Walt",
    "coffee.png": "CC0, Rachel Michetti",
    "coins.png": "no known copyright restrictions, Brooklyn Museum",
    "grass.png": "CC0",
    "gravel.png": "CC0",
    "horse.png": "CC0, Andreas Preuss",
    "hubble_deep_field.jpg": "NASA, public domain",
    "ihc.png": "no known copyright restrictions",
    "microaneurysms.png": "CC0, Andreas Maier",
    "retina.jpg": "CC0",
    "rocket.jpg": "SpaceX, public domain",
    "text.png": "public domain",
}

ATTRIBUTION = """# Attribution

Pictures as distributed with the Python package scikit-image, cropped and scaled to {side} x {side} pixels:

{pictures}

Made by `python -m mm data prepare skimage`. {summary}
"""


def prepare_skimage(out: Path, source: Path | None, seed: int) -> Made:
    """Write skimage-train-000000.tar, .. and skimage-eval-000000.tar. source: the folder of the pictures, by
    default the installed package's.
    """
    folder = source or _installed()
    pictures = {name: folder / name for name in LICENCES if (folder / name).is_file()}
    if len(pictures) < 4:
        raise DataError(
            f"{folder} has {len(pictures)} of scikit-image's pictures; needed: at least 4, two of which are "
            f"held out, such as {', '.join(list(LICENCES)[:4])}"
        )
    by_split = split_pictures(list(pictures), seed)
    shards = []
    for split, names in by_split.items():
        own = [opened(pictures[name], SIDE).convert("RGB") for name in names]
        samples = _samples(own, SAMPLES[split], f"{seed} {split}")
        shards += write_shards(out, f"skimage-{split}", samples)
    summary = "; ".join(f"{SAMPLES[s]} samples of {len(own)} pictures ({s})" for s, own in by_split.items())
    said = "\n".join(f"- {name}: {LICENCES[name]}" for name in pictures)
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(side=SIDE, pictures=said, summary=f"{summary}."))
    return Made(shards, f"{summary}.")


def _installed() -> Path:
    spec = find_spec("skimage")  # found, not imported: only its pictures are needed
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'skimage'", name="skimage")
    return Path(spec.submodule_search_locations[0]) / "data"


def split_pictures(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """By split, the pictures: a quarter of them is held out, and at least two."""
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    n = max(2, len(names) // 4)
    return {"train": sorted(drawn[n:]), "eval": sorted(drawn[:n])}


def lightness(picture: Image) -> int:
    """The mean of a picture's grey values, from 0 to LEVELS - 1."""
    grey = picture.convert("L").tobytes()
    return sum(grey) * LEVELS // (256 * len(grey))


def _samples(pictures: Sequence[Image], n: int, seed: str) -> Iterator[WrittenSample]:
    rng = random.Random(seed)
    for k in shown(range(n), "skimage: samples"):
        same = rng.random() < 0.5
        first, other = rng.sample(pictures, 2)
        crops = [_crop(first, rng), _crop(first if same else other, rng)]
        segments: list[dict[str, object]] = [{"vision": "a.png"}, {"vision": "b.png"}]
        for before, crop in zip(("light ", " and "), crops, strict=True):
            segments += [{"text": before}, {"text": str(lightness(crop)), "depends": "vision"}]
        segments += [{"text": ", "}, {"text": "same" if same else "other", "depends": "vision"}]
        segments.append({"text": " picture"})
        yield sample(f"{k:05d}", segments, {"a.png": png(crops[0]), "b.png": png(crops[1])})


def _crop(picture: Image, rng: random.Random) -> Image:
    """A square of the picture at a drawn place, scaled to SIDE."""
    from PIL import Image as images

    side = min(rng.randint(*CROP), *picture.size)
    left, top = (rng.randint(0, n - side) for n in picture.size)
    box = (left, top, left + side, top + side)
    return picture.resize((SIDE, SIDE), images.Resampling.LANCZOS, box)
