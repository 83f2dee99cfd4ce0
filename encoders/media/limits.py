"""Limits on the sizes of media: what is larger is refused by its header, before it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Largest sizes of an item. The defaults are bounds: a probe reads nothing larger.

    pixels: of a picture, or of one frame of a video; Pillow's own bound, a quarter of a GiB in colour.
    frames: of a video.
    samples: of a sound, for each channel; as float32 they are 2 GiB.
    bytes: of the item's file.
    """

    pixels: int = 89_478_485
    frames: int = 2**20
    samples: int = 2**29
    bytes: int = 2**31

    def check(self, meta: Mapping[str, Any], size: int = 0) -> None:
        """Raise ValueError for an item with this metadata, and of `size` bytes, that is larger."""
        found = {
            "pixels": meta.get("height", 0) * meta.get("width", 0),
            "frames": meta.get("pictures", 0),
            "samples": meta.get("samples", 0),
            "bytes": size,
        }
        for name, n in found.items():
            if n > getattr(self, name):
                raise ValueError(
                    f"{_said(name, n, meta)}, more than data.limits.{name}={getattr(self, name)}; needed: a "
                    f"smaller file, or a limit of at least {n} (at most {getattr(BOUNDS, name)})"
                )


BOUNDS = Limits()


def _said(name: str, n: int, meta: Mapping[str, Any]) -> str:
    return f"{meta['height']}x{meta['width']} pixels are {n}" if name == "pixels" else f"it has {n} {name}"
