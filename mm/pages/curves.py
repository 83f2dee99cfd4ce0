"""Charts of curves over steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mm.pages.html import clean, content, el, join, plot
from mm.pages.tables import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 58, 390, 10, 192
STRETCHES = 200  # that a curve is thinned to, each drawn by two points
MOST = 12  # curves that can be told apart in one chart
COLOURS, DASHES = 6, ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Curve:
    """Values over steps, in order of steps. What is not finite leaves a gap."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def thin(curve: Curve, stretches: int = STRETCHES) -> Curve:
    """A curve with at most two points a stretch of steps: the lowest and the highest there, in their order.

    A curve of no more points than that stays whole. Spikes stay, however short, and so does the last point.
    """
    found = [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if math.isfinite(x)]
    if len(found) <= 2 * stretches:
        return Curve(curve.name, [x for x, _ in found], [y for _, y in found])
    kept: list[int] = []
    for k in range(stretches):
        part = range(k * len(found) // stretches, (k + 1) * len(found) // stretches)
        finite = [i for i in part if math.isfinite(found[i][1])]
        gap = [i for i in part if not math.isfinite(found[i][1])][:1]
        extremes = (
            [min(finite, key=lambda i: found[i][1]), max(finite, key=lambda i: found[i][1])] if finite else []
        )
        kept += sorted({*extremes, *gap})
    kept += [] if kept[-1] == len(found) - 1 else [len(found) - 1]
    return Curve(curve.name, [found[i][0] for i in kept], [found[i][1] for i in kept])


def chart(id: str, title: str, unit: str, curves: Sequence[Curve], *, x_name: str = "step") -> Markup:
    """A chart with its key, its range in words, and the values at a step for pointers and keys.

    id: the page's own name of it. unit: of the values. Nothing is drawn of curves without a finite value.
    """
    drawn = [thin(c) for c in curves if any(map(math.isfinite, c.values))]
    left_out = len(drawn) - MOST
    drawn = drawn[:MOST]
    if not drawn:
        return Markup()
    ys = [y for c in drawn for y in c.values if math.isfinite(y)]
    xs = [x for c in drawn for x in c.steps]
    low, high = _room(min(ys), max(ys))
    first, last = min(xs), max(xs)
    shapes = [*_grid(low, high, first, last, x_name)]
    for i, c in enumerate(drawn):
        shapes += _lines(i, c, (first, last), (low, high))
    described = " ".join(_described(c) for c in drawn)
    shapes.append(el("line", class_="cursor", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM))
    svg = plot(id, title, described, shapes, (WIDTH, HEIGHT))
    data = {
        "left": LEFT,
        "right": RIGHT,
        "low": first,
        "high": last,
        "unit": x_name,
        "curves": list(map(_data, drawn)),
    }
    more = f" {left_out} more are not drawn." if left_out > 0 else ""
    return el(
        "figure",
        el(
            "figcaption",
            el("b", title),
            f" ({unit}) " if unit else " ",
            el("span", _described(drawn[0]) if len(drawn) == 1 else more),
        ),
        svg,
        _key(drawn) if len(drawn) > 1 else "",
        el("p", class_="readout", aria_live="polite"),
        data_chart=json.dumps(data, allow_nan=False, separators=(",", ":")),
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from low to high, at most `most` of them."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    while span / step > most:
        step *= (
            2
            if span / (2 * step) <= most
            else 2.5
            if span / (2.5 * step) <= most
            else 5
            if span / (5 * step) <= most
            else 10
        )
    start = math.ceil(low / step - 1e-9)
    return [k * step for k in range(start, math.floor(high / step + 1e-9) + 1)]


def swatch(i: int) -> Markup:
    """How curve i is drawn, as a small picture beside its name."""
    line = el("line", x1=0, x2=26, y1=6, y2=6, class_=f"curve {_style(i)}", stroke_dasharray=_dash(i))
    return el("svg", line, class_="plot", viewBox="0 0 26 12", aria_hidden="true")


def _style(i: int) -> str:
    return f"c{i % COLOURS}"


def _dash(i: int) -> str | None:
    return DASHES[(i + i // COLOURS) % len(DASHES)] or None


def _key(curves: Sequence[Curve]) -> Markup:
    return el("ul", *(el("li", swatch(i), el("bdi", c.name)) for i, c in enumerate(curves)), class_="key")


def _described(c: Curve) -> Markup:
    found = [(x, y) for x, y in zip(c.steps, c.values, strict=True) if math.isfinite(y)]
    (x0, y0), (x1, y1) = found[0], found[-1]
    low = min(found, key=lambda p: p[1])
    high = max(found, key=lambda p: p[1])
    text = (
        f"From {number(y0)} ({number(x0)}) to {number(y1)} ({number(x1)}); "
        f"lowest {number(low[1])}, highest {number(high[1])}."
    )
    return content(f"{c.name}: {text}" if c.name else text)


def _data(c: Curve) -> dict[str, object]:
    found = [(x, y) for x, y in zip(c.steps, c.values, strict=True) if math.isfinite(y)]
    return {"name": clean(c.name), "x": [x for x, _ in found], "y": [float(f"{y:.5g}") for _, y in found]}


def _room(low: float, high: float) -> tuple[float, float]:
    """The range of an axis: from 0 where that costs little, else with some room."""
    if low == high:
        room = abs(low) / 2 or 1.0
        return (0.0, 2 * high) if high > 0 else (low - room, high + room)
    if 0 <= low < 0.5 * high:
        return 0.0, high * 1.04
    room = (high - low) * 0.04
    return low - room, high + room


def _at(x: float, of: tuple[float, float], to: tuple[float, float]) -> float:
    share = (x - of[0]) / ((of[1] - of[0]) or 1.0)
    return to[0] + share * (to[1] - to[0])


def _grid(low: float, high: float, first: float, last: float, x_name: str) -> list[Markup]:
    out = []
    for v in ticks(low, high):
        y = f"{_at(v, (low, high), (BOTTOM, TOP)):.1f}"
        out.append(el("line", class_="grid", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        out.append(el("text", _tick(v), x=LEFT - 6, y=y, text_anchor="end", dominant_baseline="central"))
    for v in ticks(first, last, 6):
        x = f"{_at(v, (first, last), (LEFT, RIGHT)):.1f}"
        out.append(el("text", _tick(v), x=x, y=BOTTOM + 14, text_anchor="middle"))
    out.append(el("text", x_name, x=RIGHT, y=HEIGHT - 2, text_anchor="end"))
    return out


def _tick(v: float) -> str:
    if v and (abs(v) < 1e-3 or abs(v) >= 1e6):
        return f"{v:.3g}"
    return f"{v:.6g}"


def _lines(i: int, c: Curve, of_x: tuple[float, float], of_y: tuple[float, float]) -> list[Markup]:
    """Lines between the gaps of a curve; a point that stands alone is a dot."""
    parts: list[list[str]] = [[]]
    for x, y in zip(c.steps, c.values, strict=True):
        if math.isfinite(y):
            parts[-1].append(f"{_at(x, of_x, (LEFT, RIGHT)):.1f},{_at(y, of_y, (BOTTOM, TOP)):.1f}")
        elif parts[-1]:
            parts.append([])
    out = []
    for points in parts:
        if len(points) == 1:
            cx, cy = points[0].split(",")
            out.append(el("circle", cx=cx, cy=cy, r=2.5, class_=f"f{i % COLOURS}"))
        elif points:
            out.append(
                el(
                    "polyline",
                    points=" ".join(points),
                    class_=f"curve {_style(i)}",
                    stroke_dasharray=_dash(i),
                )
            )
    return out


def grid(charts: Sequence[Markup]) -> Markup:
    """Charts side by side where there is room."""
    return el("div", join(charts), class_="charts")
