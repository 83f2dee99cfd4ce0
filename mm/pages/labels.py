"""Where labels of points go, so that none covers another or a point. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

HIGH, DIGIT, DOT = 14.0, 7.5, 5.0  # of a label, of each of its letters, and around a point
FAR = 16  # rings of places around a point, each further away
AROUND = 16  # places of a ring


class Box(NamedTuple):
    """A rectangle by its middle."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        """Whether two cover a common place."""
        wide, high = (self.width + other.width) / 2, (self.height + other.height) / 2
        return abs(self.x - other.x) < wide and abs(self.y - other.y) < high

    def inside(self, other: Box) -> bool:
        """Whether all of it is in another."""
        wide, high = (other.width - self.width) / 2, (other.height - self.height) / 2
        return abs(self.x - other.x) <= wide and abs(self.y - other.y) <= high


def labels(points: Sequence[tuple[float, float]], texts: Sequence[str], room: Box) -> list[Box]:
    """Of each point the box of its label: the nearest place that is free. O(n^2) in points.

    Where nothing is free the label is at its point.
    """
    taken = [Box(x, y, 2 * DOT, 2 * DOT) for x, y in points]
    out = []
    for (x, y), text in zip(points, texts, strict=True):
        width = DIGIT * len(text) + 2
        free = (b for b in _places(x, y, width) if b.inside(room) and not any(b.meets(t) for t in taken))
        box = next(free, Box(x, y, width, HIGH))
        taken.append(box)
        out.append(box)
    return out


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """From near to far, above to the right first."""
    for ring in range(FAR):
        far = 14.0 + 11.0 * ring
        for k in range(AROUND):
            turn = math.pi / 4 + 2 * math.pi * k / AROUND
            yield Box(x + far * math.cos(turn), y - far * math.sin(turn), width, HIGH)
