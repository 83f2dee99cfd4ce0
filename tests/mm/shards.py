"""Small data sets made for tests."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    """A tar of samples: {"key": .., "segments": [..] or "messages": [..], "parts": {name: bytes}}."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            written = {k: v for k, v in sample.items() if k not in ("key", "parts")}
            files = {"json": json.dumps(written).encode(), **sample["parts"]}
            for name, payload in files.items():
                info = tarfile.TarInfo(f"{sample['key']}.{name}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sensor_samples(
    n: int, seed: int = 0, *, module: str = "sensor", shape: tuple[int, ...] = (3,)
) -> list[dict[str, Any]]:
    """Samples with no to two time series [n, *shape] each, and text about them."""
    rng = random.Random(seed)
    draw = np.random.default_rng(seed)
    out = []
    for k in range(n):
        count = rng.choice([0, 1, 1, 2])
        parts = {f"sen{i}.npy": npy(draw.normal(size=(rng.choice([1, 5, 9]), *shape))) for i in range(count)}
        segments: list[dict[str, Any]] = [{module: name} for name in parts]
        segments += [{"text": "level "}, {"text": str(rng.randrange(10)), "depends": module}]
        out.append({"key": f"s{k:03d}", "segments": segments, "parts": parts})
    return out
