"""What a drawing shows of a step, from a simulated plan and from a measured run alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.schedule.action import BOUNDARY, COMPUTE, Kind
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.simulate import Timeline


@dataclass(frozen=True)
class Bar:
    """A computation on a row. chunk: which of the rank's virtual stages, from 0; seconds from the start."""

    row: int
    start: float
    end: float
    module: str
    kind: Kind
    microbatch: int
    span: int = 1
    chunk: int = 0


@dataclass(frozen=True)
class Arrow:
    """Rows that go from one row of the chart to another. boundary: between modules, else along a pipeline."""

    source: int
    start: float
    target: int
    end: float
    module: str
    boundary: bool
    backward: bool


@dataclass(frozen=True)
class Row:
    """A rank, or ranks that do the same. lives: the modules and pipeline ranks there; bubble: idle share."""

    label: str
    lives: str
    bubble: float


@dataclass(frozen=True)
class Chart:
    """A step to be drawn. modules: in the order of their colours."""

    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    modules: tuple[str, ...]
    seconds: float
    kind: str


def simulated(line: Timeline) -> Chart:
    """The chart of a simulation, one row for all ranks of a program."""
    plan = line.plan
    bars, arrows = [], []
    for p, program in enumerate(plan.programs):
        for a, start, end in zip(program, line.start[p], line.end[p], strict=True):
            if a.kind in COMPUTE and end > start:
                chunk = a.stage // plan.modules[a.module].layout.pp
                bars.append(Bar(p, start, end, a.module, a.kind, a.microbatch, a.span, chunk))
    for t in line.transfers:
        backward = t.kind in (Kind.SEND_BACKWARD, Kind.BOUNDARY_BACKWARD)
        arrows.append(Arrow(t.source, t.start, t.target, t.end, t.module, t.kind in BOUNDARY, backward))
    rows = tuple(
        Row(_ranks(ranks), _lives(plan, p), line.bubble(ranks[0])) for p, ranks in enumerate(plan.ranks_of)
    )
    return Chart(rows, tuple(bars), tuple(arrows), tuple(plan.modules), line.seconds, plan.kind)


def measured(plan: SchedulePlan, records: Mapping[int, Sequence[Record]]) -> Chart:
    """The chart of a run, from the records of its ranks (observe=records.append), whose clocks must agree.

    An arrow stands where the last of the senders of what a computation waited for had it ready.
    """
    first = min((r[0].start for r in records.values() if r), default=0.0)
    bars: list[Bar] = []
    rows: list[Row] = []
    sent: dict[tuple[object, ...], list[tuple[int, float]]] = {}
    end = max((r[-1].end for r in records.values() if r), default=0.0) - first
    for row, rank in enumerate(sorted(records)):
        busy = 0.0
        for action, begin, stop, ready in records[rank]:
            if action.kind in COMPUTE:
                chunk = action.stage // plan.modules[action.module].layout.pp
                busy += stop - ready
                where = (row, ready - first, stop - first, action.module, action.kind)
                bars.append(Bar(*where, action.microbatch, action.span, chunk))
            elif action.kind in _SENT:
                stage = action.stage if action.kind in BOUNDARY else None
                key = (action.kind, action.module, action.peer, stage, action.microbatch)
                sent.setdefault(key, []).append((row, begin - first))
        rows.append(Row(f"rank {rank}", _lives(plan, plan.program_of[rank]), 1 - busy / end if end else 0.0))
    arrows = [arrow for bar in bars for arrow in _arrows(plan, sorted(records), bar, sent)]
    return Chart(tuple(rows), tuple(bars), tuple(arrows), tuple(plan.modules), end, f"{plan.kind}, measured")


_SENT = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.BOUNDARY_FORWARD, Kind.BOUNDARY_BACKWARD)


def _arrows(
    plan: SchedulePlan,
    ranks: Sequence[int],
    bar: Bar,
    sent: Mapping[tuple[object, ...], list[tuple[int, float]]],
) -> list[Arrow]:
    """What a computation waited for, among what other rows have started to send."""
    use = plan.modules[bar.module]
    stage = bar.chunk * use.layout.pp + use.layout.coord(ranks[bar.row]).pp
    forward = bar.kind is Kind.FORWARD
    keys: list[tuple[object, ...]] = []
    if forward and stage:
        keys = [(Kind.SEND_FORWARD, bar.module, stage, None, bar.microbatch)]
    if forward and bar.module == plan.sink:
        entering = [m for m in plan.entering(stage) if m in plan.active[bar.microbatch]]
        keys += [(Kind.BOUNDARY_FORWARD, m, None, stage, bar.microbatch) for m in entering]
    elif forward or bar.kind is Kind.BACKWARD_WEIGHT:
        pass
    elif stage + 1 < use.stages:
        keys = [(Kind.SEND_BACKWARD, bar.module, stage, None, bar.microbatch)]
    elif bar.module != plan.sink:
        covered = range(bar.microbatch, bar.microbatch + bar.span)
        keys = [(Kind.BOUNDARY_BACKWARD, bar.module, None, s, i) for i in covered for s in use.enters]
    out = []
    for key in keys:
        boundary = key[2] is None
        peers = ranks if boundary else use.layout.peers(ranks[bar.row], "pp")
        senders = [(t, row) for row, t in sent.get(key, ()) if ranks[row] in peers and t <= bar.start]
        start, row = max((s for s in senders if _sends(plan, ranks[s[1]], key)), default=(0.0, bar.row))
        if row != bar.row:
            out.append(Arrow(row, start, bar.row, start, str(key[1]), boundary, not forward))
    return out


def _sends(plan: SchedulePlan, rank: int, key: tuple[object, ...]) -> bool:
    """Whether a rank is where the rows of a boundary come from, not only where they go."""
    source = sink = frozenset[int]()
    if isinstance(key[3], int):
        source, sink = plan.ends(str(key[1]), key[3])
    if key[0] is Kind.BOUNDARY_FORWARD:
        return plan.program_of[rank] in source
    return key[0] is not Kind.BOUNDARY_BACKWARD or plan.program_of[rank] in sink


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"{len(ranks)} ranks from {ranks[0]}"


def _lives(plan: SchedulePlan, program: int) -> str:
    """The modules at a place; with their pipeline rank where they have several."""
    found = [
        m if plan.modules[m].layout.pp == 1 else f"{m} {pp + 1}/{plan.modules[m].layout.pp}"
        for m, pp in zip(plan.modules, plan.places[program], strict=True)
        if pp is not None
    ]
    return ", ".join(found)
