"""Items and encoder modules for tests."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

import encoders
from encoders.contract import ItemBatch, pack_items
from encoders.module import EncoderModule, build_encoder_module
from parallel.axis import Axes
from parallel.param import initialise

SMALL: dict[str, dict[str, Any]] = {
    "vit": {"width": 24, "heads": 12, "layers": 2, "mlp": 48, "max_grid": 16},
    "fastconformer": {"mels": 16, "channels": 4, "width": 24, "heads": 12, "layers": 2, "ffn": 48},
}


def png(height: int, width: int, seed: int = 0, mode: str = "L") -> bytes:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: int, rate: int = 8000, width: int = 1, channels: int = 1, seed: int = 0) -> bytes:
    raw = np.random.default_rng(seed).integers(0, 256, samples * width * channels, dtype=np.uint8)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(raw.tobytes())
    return buffer.getvalue()


def item(name: str, size: Any, seed: int = 0) -> tuple[bytes, dict[str, int]]:
    """(payload, metadata): size is (height, width) of a picture or the samples of a clip."""
    if name == "vit":
        return png(*size, seed=seed), {"height": size[0], "width": size[1]}
    return wav(size, seed=seed), {"samples": size, "rate": 8000}


def batch(name: str, sizes: Sequence[Any], dtype: torch.dtype = torch.float64) -> ItemBatch:
    cls = encoders.resolve(name)
    cfg = cls.Config(**SMALL[name])
    items = [item(name, size, seed) for seed, size in enumerate(sizes)]
    tensors = [cls.prepare(cfg, payload, meta) for payload, meta in items]
    return pack_items(cls, cfg, tensors, [meta for _, meta in items], device="cpu", dtype=dtype)


def module(name: str, axes: Axes | None = None, dtype: torch.dtype = torch.float64) -> EncoderModule:
    cls = encoders.resolve(name)
    built = build_encoder_module(
        cls,
        cls.Config(**SMALL[name]),
        d_out=20,
        projector_hidden=24,
        axes=axes or Axes(),
        dtype=dtype,
    )
    initialise(built, 0, name)
    return built


SIZES: dict[str, list[Any]] = {
    "vit": [(8, 8), (4, 12), (8, 8), (12, 8)],
    "fastconformer": [3000, 1, 0, 4111, 799, 800],
}
