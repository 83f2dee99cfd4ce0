"""Bars of parts, one below the other on one scale, with their numbers in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mm.pages.curves import COLOURS, ticks
from mm.pages.html import el, plot
from mm.pages.tables import Cell, Column, details, table

WIDTH, LEFT, RIGHT, ROW, TOP = 400, 104, 392, 22, 4
HATCHES = (None, 45, -45, 0, 90)  # degrees of the lines over a part's colour, so that colour is not all


@dataclass(frozen=True)
class Scale:
    """What several pictures have in common.

    most: the least end of the scale. label: of the names of rows. parts: those that have colours first.
    unit: of which marks on the scale are round numbers.
    """

    label: str = "row"
    most: float = 0.0
    parts: Sequence[str] = ()
    unit: float = 1.0


def bars(
    id: str,
    title: str,
    rows: Mapping[str, Mapping[str, float]],
    shown: Callable[[float], str],
    scale: Scale | None = None,
) -> Markup:
    """A bar a row, of its parts end to end; the numbers are in a table below.

    rows: by name, each part's value, at least 0. shown: a value as text. id: the page's name of the picture.
    """
    scale = scale or Scale()
    there = dict.fromkeys(part for row in rows.values() for part, value in row.items() if value > 0)
    parts = list(dict.fromkeys([*scale.parts, *there]))
    longest = max((sum(row.values()) for row in rows.values()), default=0.0)
    whole = max(longest, scale.most)
    if not whole > 0:
        return Markup()
    bottom = TOP + len(rows) * ROW
    shapes: list[Markup] = [el("defs", *(_hatch(id, k) for k in range(1, len(HATCHES))))]
    for tick in (scale.unit * t for t in ticks(0.0, whole / scale.unit, 4)):
        x = f"{_x(tick, whole):.1f}"
        anchor = "start" if not tick else "end" if tick > 0.9 * whole else "middle"
        shapes.append(el("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom))
        shapes.append(el("text", shown(tick), x=x, y=bottom + 13, text_anchor=anchor))
    for i, (name, row) in enumerate(rows.items()):
        shapes += _row(id, TOP + i * ROW, name, [(parts.index(p), v) for p, v in row.items() if v > 0], whole)
    described = [f"{name}: {shown(sum(row.values()))}." for name, row in rows.items()]
    svg = plot(id, title, " ".join(described), shapes, (WIDTH, bottom + 20))
    key = el("ul", *(el("li", _swatch(id, parts.index(p)), el("bdi", p)) for p in there), class_="key")
    columns = [Column(scale.label), *(Column(p, True) for p in there), Column("together", True)]
    cells = [
        [name, *(Cell(shown(v), v) for v in (*(row.get(p, 0.0) for p in there), sum(row.values())))]
        for name, row in rows.items()
    ]
    numbers = details("Numbers", table(title, columns, cells))
    return el("figure", el("figcaption", el("b", title)), svg, key if len(there) > 1 else "", numbers)


def _row(id: str, y: float, name: str, found: Sequence[tuple[int, float]], whole: float) -> list[Markup]:
    short = name if len(name) <= 14 else f"{name[:6]}..{name[-6:]}"
    out = [el("text", short, x=LEFT - 6, y=y + 9, text_anchor="end", dominant_baseline="central")]
    at = 0.0
    for part, value in found:
        x, width = _x(at, whole), max(0.4, value / whole * (RIGHT - LEFT) - 0.6)
        place = {"x": f"{x:.1f}", "y": y + 1, "width": f"{width:.1f}", "height": ROW - 6}
        out.append(el("rect", **place, class_=f"f{part % COLOURS}"))
        if part % len(HATCHES):
            out.append(el("rect", **place, fill=f"url(#{id}-hatch{part % len(HATCHES)})"))
        at += value
    return out


def _hatch(id: str, k: int) -> Markup:
    line = el("line", class_="hatch", x1=0, x2=0, y1=0, y2=6)
    turned = f"rotate({HATCHES[k]})"
    return el(
        "pattern",
        line,
        id=f"{id}-hatch{k}",
        width=6,
        height=6,
        patternUnits="userSpaceOnUse",
        patternTransform=turned,
    )


def _swatch(id: str, part: int) -> Markup:
    box = {"width": 26, "height": 12, "rx": 2}
    over = el("rect", **box, fill=f"url(#{id}-hatch{part % len(HATCHES)})") if part % len(HATCHES) else ""
    return el(
        "svg",
        el("rect", **box, class_=f"f{part % COLOURS}"),
        over,
        class_="plot",
        viewBox="0 0 26 12",
        aria_hidden="true",
    )


def _x(value: float, whole: float) -> float:
    return LEFT + value / whole * (RIGHT - LEFT)
