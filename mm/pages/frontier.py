"""Time against memory: what is given up of one for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from mm.pages.curves import ticks
from mm.pages.html import el, plot
from mm.pages.tables import seconds, size, size_unit

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 240, 66, 380, 14, 196


class Point(NamedTuple):
    """step_s: seconds of a step. bytes: of the fullest rank."""

    name: str
    step_s: float
    bytes: float


def frontier(id: str, title: str, points: Sequence[Point]) -> Markup:
    """Numbered points, and a line along those that no other beats in both; the numbers are named below."""
    if not points:
        return Markup()
    unit = size_unit(max(p.bytes for p in points))[1]
    most_s, most_bytes = 1.05 * max(p.step_s for p in points), 1.05 * max(p.bytes for p in points)
    shapes = []
    for v in (unit * t for t in ticks(0.0, most_bytes / unit, 4)):
        at = f"{_x(v, most_bytes):.1f}"
        shapes.append(el("line", class_="grid", x1=at, x2=at, y1=TOP, y2=BOTTOM))
        shapes.append(el("text", size(v), x=at, y=BOTTOM + 15, text_anchor="middle" if v else "start"))
    for v in ticks(0.0, most_s, 5):
        at = f"{_y(v, most_s):.1f}"
        place = {"x": LEFT - 5, "y": at, "text_anchor": "end", "dominant_baseline": "central"}
        shapes.append(el("line", class_="grid", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        shapes.append(el("text", seconds(v), **place))
    edge = unbeaten(points)
    line = " ".join(f"{_x(p.bytes, most_bytes):.1f},{_y(p.step_s, most_s):.1f}" for p in edge)
    shapes.append(el("polyline", points=line, class_="curve c0", stroke_dasharray="4 3"))
    for k, p in enumerate(points, 1):
        x, y = _x(p.bytes, most_bytes), _y(p.step_s, most_s)
        shapes.append(el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="f0" if p in edge else "f4"))
        shapes.append(el("text", str(k), x=f"{x + 7:.1f}", y=f"{y - 7:.1f}", class_="ink"))
    shapes.append(el("text", "step", x=4, y=TOP))
    shapes.append(el("text", "memory of the fullest rank", x=RIGHT, y=HEIGHT - 10, text_anchor="end"))
    about = [f"{p.name}: {seconds(p.step_s)}, {size(p.bytes)}." for p in points]
    svg = plot(id, title, " ".join(about), shapes, (WIDTH, HEIGHT))
    named = [
        el("li", f"{k}: ", el("bdi", p.name), f", {seconds(p.step_s)}, {size(p.bytes)}")
        for k, p in enumerate(points, 1)
    ]
    caption = el("figcaption", el("b", title), " Those on the line are beaten by no other in both.")
    return el("figure", caption, svg, el("ul", *named, class_="key"))


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both seconds and bytes, the fastest first."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.step_s, p.bytes)):
        if not out or p.bytes < out[-1].bytes:
            out.append(p)
    return out


def _x(value: float, most: float) -> float:
    return LEFT + value / (most or 1.0) * (RIGHT - LEFT)


def _y(value: float, most: float) -> float:
    return BOTTOM - value / (most or 1.0) * (BOTTOM - TOP)
