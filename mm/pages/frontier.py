"""Time against memory: what is given up of one for the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from mm.pages.curves import ticks
from mm.pages.html import el, plot
from mm.pages.labels import Box, labels
from mm.pages.tables import seconds, size, size_unit

WIDTH, HEIGHT = 960, 400
ROOM = Box(508, 184, 880, 336)  # of the points, in the picture
NEAR = 18.0  # from a point to its label, beyond which a line joins them


class Point(NamedTuple):
    """step_s: seconds of a step. bytes: of the fullest rank."""

    name: str
    step_s: float
    bytes: float


def frontier(id: str, title: str, points: Sequence[Point]) -> Markup:
    """Numbered points, and a line along those that no other beats in both; the numbers are named below."""
    if not points:
        return Markup()
    across, up = _axis([p.bytes for p in points]), _axis([p.step_s for p in points])
    unit = size_unit(max(p.bytes for p in points))[1]
    left, right, top, bottom = _edges()
    shapes = []
    for v in (unit * t for t in ticks(across[0] / unit, across[1] / unit, 8)):
        at = f"{_along(v, across, left, right):.1f}"
        shapes.append(el("line", class_="grid", x1=at, x2=at, y1=top, y2=bottom))
        shapes.append(el("text", size(v), x=at, y=bottom + 18, text_anchor="middle"))
    for v in ticks(*up, 6):
        at = f"{_along(v, up, bottom, top):.1f}"
        place = {"x": left - 6, "y": at, "text_anchor": "end", "dominant_baseline": "central"}
        shapes.append(el("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
        shapes.append(el("text", seconds(v), **place))
    edge, at_ = unbeaten(points), {}
    for p in points:
        at_[p] = _along(p.bytes, across, left, right), _along(p.step_s, up, bottom, top)
    line = " ".join(f"{at_[p][0]:.1f},{at_[p][1]:.1f}" for p in edge)
    shapes.append(el("polyline", points=line, class_="curve c0", stroke_dasharray="4 3"))
    shapes += _numbered([at_[p] for p in points], [p in edge for p in points])
    shapes.append(el("text", "memory of the fullest rank", x=right, y=HEIGHT - 8, text_anchor="end"))
    shapes.append(el("text", "seconds of a step", x=4, y=11))
    about = [f"{p.name}: {seconds(p.step_s)}, {size(p.bytes)}." for p in points]
    svg = plot(id, title, " ".join(about), shapes, (WIDTH, HEIGHT))
    named = [
        el("li", f"{k}: ", el("bdi", p.name), f", {seconds(p.step_s)}, {size(p.bytes)}")
        for k, p in enumerate(points, 1)
    ]
    zero = "" if across[0] == up[0] == 0 else " The axes do not begin at zero."
    said = f" Up the page a step takes longer. Those on the line are beaten by no other in both.{zero}"
    box = el("div", svg, class_="scroll wide", role="region", aria_label=title, tabindex="0")
    return el("figure", el("figcaption", el("b", title), said), box, el("ul", *named, class_="key"))


def _numbered(at: Sequence[tuple[float, float]], edge: Sequence[bool]) -> list[Markup]:
    """Points with their numbers, each where it covers nothing."""
    out = []
    for (x, y), best in zip(at, edge, strict=True):
        out.append(el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="f0" if best else "f4"))
    texts = [str(k) for k in range(1, len(at) + 1)]
    for (x, y), text, box in zip(at, texts, labels(at, texts, ROOM), strict=True):
        if math.dist((x, y), (box.x, box.y)) > NEAR:
            ends = {"x1": f"{x:.1f}", "y1": f"{y:.1f}", "x2": f"{box.x:.1f}", "y2": f"{box.y:.1f}"}
            out.insert(0, el("line", class_="grid", **ends))
        place = {"text_anchor": "middle", "dominant_baseline": "central"}
        out.append(el("text", text, x=f"{box.x:.1f}", y=f"{box.y:.1f}", class_="ink halo", **place))
    return out


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both seconds and bytes, the fastest first."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.step_s, p.bytes)):
        if not out or p.bytes < out[-1].bytes:
            out.append(p)
    return out


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of its values, and a little more at both ends."""
    low, high = min(values), max(values)
    more = 0.08 * (high - low) or 0.05 * high or 1.0
    return max(0.0, low - more), high + more


def _edges() -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the room for points."""
    wide, high = ROOM.width / 2, ROOM.height / 2
    return ROOM.x - wide, ROOM.x + wide, ROOM.y - high, ROOM.y + high


def _along(value: float, axis: tuple[float, float], start: float, end: float) -> float:
    return start + (value - axis[0]) / (axis[1] - axis[0]) * (end - start)
