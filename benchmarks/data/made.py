"""Pictures, the formats that loaders read them from, and a job that only reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.ranks.feed import Feed
from mm.ranks.job import build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.one_step import open_feed

PATCH = 16


def jpegs(count: int, side: int, seed: int = 0) -> Iterator[bytes]:
    """Pictures as smooth and as noisy as photographs, quality 90: about 25 kB at 224 px."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def write_tars(folder: Path, pictures: Sequence[bytes], shards: int) -> None:
    """Shards of samples: a picture, and a json that says where it stands."""
    for n in range(shards):
        with tarfile.open(folder / f"pictures-{n:06d}.tar", "w") as tar:
            for i, picture in enumerate(pictures[n::shards]):
                text = json.dumps({"segments": [{"vision": "i.jpg"}, {"text": str(i % 10)}]}).encode()
                for name, payload in ((f"{n}-{i:06d}.json", text), (f"{n}-{i:06d}.i.jpg", picture)):
                    info = tarfile.TarInfo(name)
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))


def vit_options(side: int) -> dict[str, int]:
    """A small encoder of such pictures, in three colours."""
    return {"channels": 3, "patch": PATCH, "max_grid": side // PATCH, "width": 24, "heads": 2, "layers": 1,
            "mlp": 24}  # fmt: skip


def config(folder: Path, side: int, batch: int, **data: Any) -> dict[str, Any]:
    """A job over the tars of a folder; its model is as small as may be."""
    llm = {"pattern": "*", "d_model": 24, "n_heads": 2, "n_kv_heads": 2, "head_dim": 12}
    vision = {"encoder": "vit", "projector": {"hidden": 24}, "options": vit_options(side)}
    data = {"train": [str(folder / "*.tar")], "context": (side // PATCH) ** 2 + 16, **data}
    train = {"steps": 1_000_000, "global_batch": batch, "dtype": "float32"}
    return {"model": {"vision": vision, "llm": llm}, "data": data, "train": train}


@contextmanager
def feeding(raw: dict[str, Any]) -> Iterator[Feed]:
    """The feed of a job of one rank, which this process is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    blueprint = draw_up(from_mapping(raw, Path()), 1)
    index = open_index(blueprint, blueprint.cfg.data.train, Path())
    job = build_job(blueprint, RankInfo(0, 1, torch.device("cpu"), node_size=blueprint.node_size))
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        yield feed
    finally:
        feed.close()
        data.assembler.reader.close()
        job.close()
        dist.destroy_process_group()
