"""A picture as a file."""

from __future__ import annotations

from pathlib import Path

from parallel.schedule.drawing.shapes import Picture
from parallel.schedule.drawing.svg import to_svg


def save(picture: Picture, path: Path) -> None:
    """Write a picture as .svg or .png, by the name's ending."""
    if path.suffix == ".svg":
        path.write_text(to_svg(picture))
    elif path.suffix == ".png":
        from parallel.schedule.drawing.png import to_png  # Pillow is needed for this alone

        to_png(picture).save(path)
    else:
        raise ValueError(f"a drawing is written as .svg or .png, given {path.name}; nearest: {path.stem}.svg")
