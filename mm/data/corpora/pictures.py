"""Pictures of a corpus as small square PNGs on white paper."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST = 0.65  # of the paper's side, the longer side of a picture that is placed at random


def stamped(picture: Image, side: int, rng: random.Random | None = None, mirror: bool = False) -> Image:
    """A picture on square white paper of `side` pixels: RGB, its shape kept, what is transparent white.

    Without rng it fills the paper, in the middle. With rng its size and place are drawn, and where `mirror`
    is true it may be mirrored.
    """
    from PIL import Image as images
    from PIL import ImageOps

    scale = side / max(picture.size) * (1.0 if rng is None else rng.uniform(SMALLEST, 1.0))
    width, height = (min(side, max(1, round(n * scale))) for n in picture.size)
    small = picture.convert("RGBA").resize((width, height), images.Resampling.LANCZOS)
    if rng is not None and mirror and rng.random() < 0.5:
        small = ImageOps.mirror(small)
    free = (side - width, side - height)
    at = (free[0] // 2, free[1] // 2) if rng is None else (rng.randint(0, free[0]), rng.randint(0, free[1]))
    paper = images.new("RGB", (side, side), "white")
    paper.paste(small, at, small)
    return paper


def png(picture: Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def opened(path: Path, side: int) -> Image:
    """The picture of a file; an SVG is drawn `side` pixels wide by the package resvg_py, without any text,
    because the fonts of a machine would change the picture.

    Raises ValueError for an SVG that cannot be drawn, OSError for any other file that is no picture.
    """
    from PIL import Image as images

    if path.suffix.lower() != ".svg":
        picture = images.open(path)
        picture.load()
        return picture
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=side, skip_system_fonts=True)
    return images.open(io.BytesIO(bytes(drawn)))
