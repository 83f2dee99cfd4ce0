"""The shapes that a picture is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

INK, PAPER = "#1f2430", "#ffffff"
ON_LIGHT = "#14181f"  # text on light bars: a theme may change INK, which is on the paper


@dataclass(frozen=True)
class Box:
    """A filled rectangle with rounded corners; opacity 0 to 1."""

    x: float
    y: float
    w: float
    h: float
    fill: str
    radius: float = 0.0
    opacity: float = 1.0


@dataclass(frozen=True)
class Curve:
    """A curve from (x1, y1) to (x2, y2), vertical at both ends, with a dot at its end."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    width: float = 1.0
    opacity: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Text:
    """A line of text. y is the middle of its height; x is where `anchor` lies."""

    x: float
    y: float
    text: str
    size: float = 12.0
    colour: str = INK
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


Shape = Box | Curve | Text


@dataclass(frozen=True)
class Picture:
    """Shapes on white paper, in pixels, in the order in which they are painted."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


def control_points(s: Curve) -> tuple[tuple[float, float], ...]:
    """The four points of the curve's cubic."""
    bend = (s.y2 - s.y1) / 2
    return ((s.x1, s.y1), (s.x1, s.y1 + bend), (s.x2, s.y2 - bend), (s.x2, s.y2))
