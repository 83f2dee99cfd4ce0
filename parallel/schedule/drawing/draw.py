"""The picture of a step: one row for each rank, time from left to right."""

from __future__ import annotations

from dataclasses import replace

from parallel.schedule.action import OVER_DATA, Kind
from parallel.schedule.drawing.chart import Arrow, Bar, Chart, Move
from parallel.schedule.drawing.shapes import ON_LIGHT, PAPER, Box, Curve, Picture, Shape, Text

# (forward, backward, weight gradient) of each module: the sink first, then sources. They can be told apart in
# greyscale and with red-green colour blindness.
PALETTE = (
    ("#5b6ee1", "#2f3c96", "#b6bff5"),
    ("#14a38b", "#0a5f52", "#a5e0d5"),
    ("#f0a030", "#a8640b", "#f8d9a6"),
    ("#d9578a", "#8c2450", "#f2bcd2"),
    ("#8a8f98", "#4a4f58", "#d2d5da"),
)
SOFT, TRACK, GRID = "#6b7280", "#eceef2", "#dfe2e8"
LINE = 20  # of the legend
LEFT, RIGHT, TOP, ROW, GAP, WIDTH = 168, 84, 74, 34, 12, 1280


def draw(
    chart: Chart, *, title: str | None = None, width: int = WIDTH, seconds: float | None = None
) -> Picture:
    """Lay out a chart. title: above it; the schedule's name where None. seconds: that the axis has at least,
    so that several charts have one scale."""
    whole = max(chart.seconds, seconds or 0.0)
    scale = (width - LEFT - RIGHT) / (whole or 1.0)
    bottom = TOP + len(chart.rows) * (ROW + GAP)
    shapes: list[Shape] = [*_head(chart, title, width), *_axis(whole, scale, bottom)]
    for k, row in enumerate(chart.rows):
        y = TOP + k * (ROW + GAP)
        shapes.append(Box(LEFT, y, width - LEFT - RIGHT, ROW, TRACK, 4))
        shapes.append(Text(16, y + ROW / 2 - 7, row.label, 13, bold=True))
        shapes.append(Text(16, y + ROW / 2 + 8, _shorten(row.modules, 26), 10.5, SOFT))
        shapes.append(Text(width - 16, y + ROW / 2, f"{100 * row.bubble:.0f} % idle", 11, SOFT, "end"))
    # Transfers are drawn behind the bars, so that numbers stay legible. Those between modules are thicker
    # than those along pipelines.
    for arrow in sorted(chart.arrows, key=lambda a: a.boundary):
        shapes.append(_arrow(chart, arrow, scale))
    shapes += [_move(chart, move, scale) for move in chart.moves]
    for bar in chart.bars:
        shapes += _bar(chart, bar, scale)
    legend = _legend(chart, bottom + 34, width)
    below = max((s.y for s in legend if isinstance(s, Text)), default=bottom + 34)
    return Picture(width, round(below) + 28, (*shapes, *legend))


def colours(chart: Chart, module: str) -> tuple[str, str, str]:
    """(forward, backward, weight gradient) of a module: the last module, the sink, has the first."""
    index = (list(chart.modules).index(module) + 1) % len(chart.modules)
    return PALETTE[min(index, len(PALETTE) - 1)]


def _head(chart: Chart, title: str | None, width: int) -> list[Shape]:
    idle = sum(row.bubble for row in chart.rows) / max(1, len(chart.rows))
    summary = f"step {_time(chart.seconds, chart.seconds)}, rows idle {100 * idle:.1f} % on average"
    return [
        Text(16, 24, title or f"schedule {chart.kind}", 17, bold=True),
        Text(width - 16, 24, summary, 12, SOFT, "end"),
    ]


def _axis(seconds: float, scale: float, bottom: float) -> list[Shape]:
    out: list[Shape] = []
    step = _tick(seconds)
    k = 0
    while seconds and k * step <= seconds * 1.0001:
        x = LEFT + k * step * scale
        out.append(Box(x - 0.5, TOP - 8, 1, bottom - TOP + 4, GRID))
        out.append(Text(x, TOP - 18, _time(k * step, seconds), 10.5, SOFT, "middle"))
        k += 1
    return out


def _bar(chart: Chart, bar: Bar, scale: float) -> list[Shape]:
    action = bar.action
    forward, backward, weight = colours(chart, action.module)
    fill = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: backward,
        Kind.BACKWARD_INPUT: backward,
        Kind.BACKWARD_WEIGHT: weight,
    }[action.kind]
    x, w = LEFT + bar.start * scale, (bar.end - bar.start) * scale
    y = TOP + bar.row * (ROW + GAP)
    inset = min(0.6, w / 8)
    top, high = y + 2.0, ROW - 4.0
    if bar.half:  # the two of a pair, one above the other
        top, high = top + (bar.half - 1) * (high / 2 + 0.5), high / 2 - 0.5
    body = Box(x=x + inset, y=top, w=w - 2 * inset, h=high, fill=fill, radius=min(3, w / 4))
    ink = ON_LIGHT if action.kind is Kind.BACKWARD_WEIGHT else PAPER
    out: list[Shape] = [body]
    if bar.chunk:  # later virtual stages carry a light band
        band = min(3.5 * bar.chunk, high / 2)
        out.append(replace(body, h=band, fill=PAPER, radius=0, opacity=0.45))
    covered = action.microbatches
    label = f"{covered[0]}" if len(covered) == 1 else f"{covered[0]}-{covered[-1]}"
    if w >= 7 * len(label) + 2:
        middle, size = top + high / 2 + (1 if bar.chunk else 0), 9.5 if bar.half else 11.5
        out.append(
            Text(x + w / 2, middle, label, size=size, colour=ink, anchor="middle", bold=True),
        )
    return out


def _move(chart: Chart, move: Move, scale: float) -> Box:
    """A thin bar below its row: gathers and sums above, messages below them."""
    x, w = LEFT + move.start * scale, (move.end - move.start) * scale
    y = TOP + move.row * (ROW + GAP) + ROW + (1 if move.kind in OVER_DATA else 6)
    forward, backward, _ = colours(chart, move.module)
    fill = backward if move.kind in _OF_GRADIENTS else forward
    return Box(
        x=x + min(0.6, w / 8), y=y, w=w - 2 * min(0.6, w / 8), h=4, fill=fill, radius=1.5, opacity=0.75
    )


_OF_GRADIENTS = (Kind.GRAD_SYNC, Kind.SEND_BACKWARD, Kind.BOUNDARY_BACKWARD)


def _arrow(chart: Chart, arrow: Arrow, scale: float) -> Curve:
    down = arrow.target > arrow.source
    y1 = TOP + arrow.source * (ROW + GAP) + (ROW if down else 0)
    y2 = TOP + arrow.target * (ROW + GAP) + (-1 if down else ROW + 1)
    x1, x2 = LEFT + arrow.start * scale, LEFT + arrow.end * scale
    if not arrow.boundary:
        return Curve(x1, y1, x2, y2, SOFT, width=0.9, opacity=0.55, dashed=arrow.backward)
    forward, backward, _ = colours(chart, arrow.module)
    colour = backward if arrow.backward else forward
    return Curve(x1, y1, x2, y2, colour, width=1.8, opacity=0.9, dashed=arrow.backward)


def _legend(chart: Chart, y: float, width: int) -> list[Shape]:
    """What colours and marks mean, in as many lines as the width needs."""
    out: list[Shape] = []
    x = float(LEFT)
    for entry, wide in _entries(chart):
        if x + wide > width and x > LEFT:
            x, y = float(LEFT), y + LINE
        out += [_moved(shape, x, y) for shape in entry]
        x += wide
    return out


def _entries(chart: Chart) -> list[tuple[list[Shape], float]]:
    """Entries of the legend, each as if it stood at (0, 0), and their widths."""
    out: list[tuple[list[Shape], float]] = []
    split = {b.action.module for b in chart.bars if b.action.kind is Kind.BACKWARD_WEIGHT}
    for module in (*chart.modules[-1:], *chart.modules[:-1]):
        names = [f"{module} forward", "backward"]
        if module in split:
            names = [f"{module} forward", "input gradient", "weight gradient"]
        for name, fill in zip(names, colours(chart, module), strict=False):
            last = 14 if name == names[-1] else 0
            entry: list[Shape] = [Box(0, -6, 12, 12, fill, 3), Text(17, 0, name, 11, SOFT)]
            out.append((entry, 30 + 6.2 * len(name) + last))
    if any(b.chunk for b in chart.bars):
        box, band = Box(0, -6, 12, 12, SOFT, 3), Box(0, -6, 12, 4, PAPER, opacity=0.45)
        out.append(([box, band, Text(17, 0, "later virtual stage", 11, SOFT)], 150))
    out.append(([Box(0, -6, 12, 12, TRACK, 3), Text(17, 0, "idle", 11, SOFT)], 60))
    if chart.moves:
        above, below = Box(0, -5, 12, 4, SOFT, 1.5), Box(0, 1, 12, 4, SOFT, 1.5)
        out.append(([above, below, Text(17, 0, "on the way: weights and sums, messages", 11, SOFT)], 250))
    if any(a.boundary for a in chart.arrows):
        colour = colours(chart, chart.modules[0])[0]
        out.append(
            ([Curve(0, 5, 12, -5, colour, width=1.8, opacity=0.9), Text(20, 0, "boundary", 11, SOFT)], 80)
        )
    return out


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Curve):
        return replace(shape, x1=shape.x1 + x, y1=shape.y1 + y, x2=shape.x2 + x, y2=shape.y2 + y)
    return replace(shape, x=shape.x + x, y=shape.y + y)


def _tick(seconds: float) -> float:
    """A round step that makes 5 to 12 ticks."""
    if seconds <= 0:
        return 1.0
    step = 10.0**-9
    while seconds / step > 12:
        for factor in (2, 2.5, 2):
            step *= factor
            if seconds / step <= 12:
                break
    return step


def _time(value: float, whole: float) -> str:
    """A time in the unit that suits the whole."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if whole >= size or unit == "us":
            return f"{value / size:.4g} {unit}"
    raise AssertionError


def _shorten(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 2] + ".."
