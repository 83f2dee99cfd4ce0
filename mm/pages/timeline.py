"""Steps over time, drawn by parallel.schedule.drawing in the colours of a page, several on one scale."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from mm.compare.result import RankResult, Timeline
from mm.pages.html import clean, el
from mm.pages.tables import scroll, seconds
from parallel.schedule.action import Action, Kind
from parallel.schedule.drawing.chart import Arrow, Bar, Chart, Row
from parallel.schedule.drawing.draw import GRID, PALETTE, SOFT, TRACK, draw
from parallel.schedule.drawing.shapes import INK
from parallel.schedule.drawing.svg import Inside, to_svg

WIDTH = 1176  # of a section on a wide page
BOXES = {TRACK: "var(--track)", GRID: "var(--line)", SOFT: "var(--soft)"}
TEXTS = {INK: "var(--ink)", SOFT: "var(--soft)"}
# Dark lines, those of gradients, cannot be seen on a dark page.
LINES = {SOFT: "var(--soft)", **{dark: f"var(--s{i})" for i, (_, dark, _) in enumerate(PALETTE)}}


def measured_chart(line: Timeline, ranks: Mapping[int, RankResult]) -> Chart:
    """The chart of a step that was watched. ranks: what is known of each rank."""
    rows = []
    for rank in line.ranks:
        known = ranks.get(rank)
        rows.append(Row(f"rank {rank}", clean(known.hosts) if known else "", known.bubble if known else 0.0))
    bars = [
        Bar(
            b.row,
            b.start,
            b.end,
            Action(Kind(b.kind), b.module, b.microbatch, b.stage, span=b.span),
            b.chunk,
            b.half,
        )
        for b in line.bars
    ]
    arrows = [
        Arrow(Kind(a.kind), a.module, a.source, a.target, a.sent, line.bars[a.bar].start) for a in line.arrows
    ]
    return Chart(tuple(rows), tuple(bars), tuple(arrows), tuple(line.modules), line.seconds, line.schedule)


def drawn(id: str, title: str, chart: Chart, longest: float) -> Markup:
    """A chart in a box that scrolls sideways. longest: seconds that the axis has at least."""
    idle = sum(row.bubble for row in chart.rows) / max(1, len(chart.rows))
    about = (
        f"{len(chart.rows)} rows, {seconds(chart.seconds)} from the first computation to the last, rows idle "
        f"{100 * idle:.0f} % on average. "
    ) + " ".join(f"{row.label}, {row.modules}: {100 * row.bubble:.0f} % idle." for row in chart.rows)
    picture = draw(chart, title=clean(title), width=WIDTH, seconds=longest)
    inside = Inside(id, clean(title), clean(about), BOXES, TEXTS, LINES)
    return el("figure", scroll(title, Markup(to_svg(picture, inside))))
