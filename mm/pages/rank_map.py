"""Which ranks each module of a job lives on, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mm.pages.curves import COLOURS, ticks
from mm.pages.html import el, plot
from mm.pages.tables import Column, table

WIDTH, LEFT, RIGHT, ROW, TOP = 400, 84, 394, 26, 4
DEGREES = ("tp", "cp", "dp", "pp", "vpp", "ep", "edp", "etp")


def rank_map(
    id: str, layouts: Mapping[str, Mapping[str, Any]], title: str = "Ranks of each module"
) -> Markup:
    """A row a module, a column a rank; a pipeline's ranks carry the number of their place in it.

    layouts: as plan.json has them: ranks, and the degree of each axis; the sink is last, and has the first
    colour, as in drawings of steps. id: the page's name of the picture.
    """
    blocks = {m: _blocks(layout) for m, layout in layouts.items()}
    world = max((b for found in blocks.values() for _, b, _ in found), default=0)
    if not world:
        return Markup()
    shapes: list[Markup] = []
    for row, (module, found) in enumerate(blocks.items()):
        y = TOP + row * ROW
        shapes.append(el("rect", x=LEFT, y=y, width=RIGHT - LEFT, height=ROW - 6, rx=3, class_="track"))
        label = module if len(module) < 12 else f"{module[:10]}.."
        shapes.append(
            el("text", label, x=LEFT - 6, y=y + ROW / 2 - 3, text_anchor="end", dominant_baseline="central")
        )
        for start, end, place in found:
            shapes += _block(
                (row + 1) % len(blocks),
                y,
                (start, end, world),
                place if len({p for *_, p in found}) > 1 else None,
            )
    bottom = TOP + len(blocks) * ROW
    for tick in ticks(0, world, 8):
        if tick == int(tick):
            x = f"{_x(tick, world):.1f}"
            shapes.append(el("text", f"{tick:.0f}", x=x, y=bottom + 12, text_anchor="middle"))
    described = [f"{m}: ranks {runs(layout.get('ranks'))}." for m, layout in layouts.items()]
    svg = plot(id, title, " ".join(described), shapes, (WIDTH, bottom + 18))
    staged = any(len({p for *_, p in found}) > 1 for found in blocks.values())
    note = " Numbers are places in a module's pipeline." if staged else ""
    return el("figure", el("figcaption", el("b", title), f" ({world} ranks, left to right).{note}"), svg)


def layout_table(layouts: Mapping[str, Mapping[str, Any]], caption: str = "Layout of each module") -> Markup:
    """Ranks and degrees of each module; a degree of 1 everywhere has no column."""
    shown = [d for d in DEGREES if any(layout.get(d) not in (None, 1) for layout in layouts.values())]
    columns = [Column("module"), Column("ranks"), *(Column(d, number=True) for d in shown)]
    rows = [
        [m, runs(layout.get("ranks")), *(layout.get(d, 1) for d in shown)] for m, layout in layouts.items()
    ]
    return table(caption, columns, rows)


def runs(ranks: object) -> str:
    """Ranks in their order, ascending runs as a-b; text as it is."""
    if not isinstance(ranks, Sequence) or isinstance(ranks, str):
        return "-" if ranks is None else str(ranks)
    out: list[list[object]] = []
    for r in ranks:
        if out and isinstance(r, int) and isinstance(out[-1][-1], int) and r == out[-1][-1] + 1:
            out[-1][1:] = [r]
        else:
            out.append([r])
    return ", ".join("-".join(map(str, run)) for run in out)


def _blocks(layout: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(first rank, one past the last, place in the pipeline) of stretches of ranks; [] for no layout."""
    ranks, pp = layout.get("ranks"), layout.get("pp", 1)
    if not isinstance(ranks, list | tuple) or not all(isinstance(r, int) and 0 <= r < 10**6 for r in ranks):
        return []
    if not isinstance(pp, int) or pp < 1 or not ranks:
        return []
    place = {r: min(pp - 1, i * pp // len(ranks)) for i, r in enumerate(ranks)}
    out: list[tuple[int, int, int]] = []
    for r in sorted(place):
        if out and out[-1][1] == r and out[-1][2] == place[r]:
            out[-1] = (out[-1][0], r + 1, place[r])
        else:
            out.append((r, r + 1, place[r]))
    return out


def _block(colour: int, y: float, span: tuple[int, int, int], place: int | None) -> list[Markup]:
    start, end, world = span
    x, right = _x(start, world), _x(end, world)
    out = [
        el(
            "rect",
            x=f"{x + 0.5:.1f}",
            y=y,
            width=f"{max(0.5, right - x - 1):.1f}",
            height=ROW - 6,
            rx=3,
            class_=f"f{colour % COLOURS}",
        )
    ]
    if place is not None and right - x >= 12:
        out.append(
            el(
                "text",
                str(place),
                class_="on",
                x=f"{(x + right) / 2:.1f}",
                y=y + ROW / 2 - 3,
                text_anchor="middle",
                dominant_baseline="central",
            )
        )
    return out


def _x(rank: float, world: int) -> float:
    return LEFT + rank / world * (RIGHT - LEFT)
