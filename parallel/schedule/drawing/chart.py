"""The content of a drawing of a step, from a simulated plan or from a measured run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.schedule.action import BOUNDARY, COMPUTE, Action, Kind
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.simulate import Timeline, Transfer


@dataclass(frozen=True)
class Bar:
    """A computation on a row of the chart.

    start, end: seconds from the start of the step. chunk: which of the rank's virtual stages, from 0.
    half: of the row: 1 the upper, with the forward of a pair, 2 the lower, with its backward, 0 all of it.
    """

    row: int
    start: float
    end: float
    action: Action
    chunk: int
    half: int = 0


class Move(NamedTuple):
    """What travels to a row or between it and its data ranks, while its computations go on.

    kind: GATHER, GRAD_SYNC, or that of a message. start, end: seconds from the start of the step.
    """

    row: int
    start: float
    end: float
    kind: Kind
    module: str


class Arrow(Transfer):
    """A transfer on a chart, where `source` and `target` are rows."""

    @property
    def boundary(self) -> bool:
        """Whether it goes from module to module, not along a pipeline."""
        return self.kind in BOUNDARY

    @property
    def backward(self) -> bool:
        """Whether it carries gradients."""
        return self.kind in (Kind.SEND_BACKWARD, Kind.BOUNDARY_BACKWARD)


@dataclass(frozen=True)
class Row:
    """A rank, or several with the same program.

    modules: those on the ranks, with pipeline ranks. bubble: idle fraction of the step.
    """

    label: str
    modules: str
    bubble: float


@dataclass(frozen=True)
class Chart:
    """A step to be drawn. modules: in the order of their colours. moves: of a simulation.

    waits: of a run, for each arrow the index of the bar that needed what it brought.
    """

    rows: tuple[Row, ...]
    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    modules: tuple[str, ...]
    seconds: float
    kind: str
    moves: tuple[Move, ...] = ()
    waits: tuple[int, ...] = ()


class Message(NamedTuple):
    """What identifies a transfer in the records of a run, at all of its ends.

    kind: SEND_FORWARD, SEND_BACKWARD or a boundary's. module: for a boundary its source.
    peer: the receiving stage of a send; None for a boundary.
    stage: the sink's stage that a boundary's rows enter; None for a send.
    """

    kind: Kind
    module: str
    peer: int | None
    stage: int | None
    microbatch: int


class Started(NamedTuple):
    """That a row has started its end of a transfer, in seconds from the start of the step."""

    time: float
    row: int


def simulated(line: Timeline) -> Chart:
    """The chart of a simulation, one row for all ranks of a program."""
    plan = line.plan
    bars = []
    for p, program in enumerate(plan.programs):
        paired = False
        for a, start, end in zip(program, line.start[p], line.end[p], strict=True):
            if a.kind in COMPUTE and end > start:
                chunk = a.stage // plan.modules[a.module].layout.pp
                bars.append(Bar(p, start, end, a, chunk, _half(a, paired)))
            paired = a.paired
    arrows = [Arrow(*transfer) for transfer in line.transfers if transfer.source != transfer.target]
    moves = tuple(Move(t.target, t.start, t.end, t.kind, t.module) for t in line.transfers if t.end > t.start)
    rows = tuple(
        Row(_ranks(ranks), _modules(plan, p), line.bubble(ranks[0])) for p, ranks in enumerate(plan.ranks_of)
    )
    return Chart(rows, tuple(bars), tuple(arrows), tuple(plan.modules), line.seconds, plan.kind, moves=moves)


def measured(plan: SchedulePlan, records: Mapping[int, Sequence[Record]]) -> Chart:
    """The chart of a run, from the records of its ranks (observe=records.append), whose clocks must agree.

    An arrow stands where the last sender of what a computation waited for started to send it.
    """
    first = min((r[0].start for r in records.values() if r), default=0.0)
    bars: list[Bar] = []
    rows: list[Row] = []
    sent: dict[Message, list[Started]] = {}
    end = max((r[-1].end for r in records.values() if r), default=0.0) - first
    for row, rank in enumerate(sorted(records)):
        busy, paired, until = 0.0, False, 0.0
        for action, begin, stop, ready in records[rank]:
            if action.kind in COMPUTE:
                chunk = action.stage // plan.modules[action.module].layout.pp
                busy += max(
                    0.0, stop - max(ready, until)
                )  # the two of a pair have most of their time in common
                bars.append(Bar(row, ready - first, stop - first, action, chunk, _half(action, paired)))
                paired, until = action.paired, max(until, stop)
            elif action.kind in _SENT:
                stage = action.stage if action.kind in BOUNDARY else None
                message = Message(action.kind, action.module, action.peer, stage, action.microbatch)
                sent.setdefault(message, []).append(Started(begin - first, row))
        rows.append(
            Row(f"rank {rank}", _modules(plan, plan.program_of[rank]), 1 - busy / end if end else 0.0)
        )
    found = [(k, a) for k, bar in enumerate(bars) for a in _arrows(plan, sorted(records), bar, sent)]
    return Chart(
        rows=tuple(rows),
        bars=tuple(bars),
        arrows=tuple(arrow for _, arrow in found),
        modules=tuple(plan.modules),
        seconds=end,
        kind=f"{plan.kind}, measured",
        waits=tuple(k for k, _ in found),
    )


def _half(a: Action, paired: bool) -> int:
    """Bar.half of a computation. paired: whether the one before it is the forward of a pair."""
    return 1 if a.paired else 2 * paired


_SENT = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.BOUNDARY_FORWARD, Kind.BOUNDARY_BACKWARD)


def _arrows(
    plan: SchedulePlan, ranks: Sequence[int], bar: Bar, sent: Mapping[Message, Sequence[Started]]
) -> list[Arrow]:
    """From the rows that sent what a computation waited for. ranks: by row."""
    rank, layout = ranks[bar.row], plan.modules[bar.action.module].layout
    out = []
    for message in _inputs(plan, bar.action):
        peers = layout.peers(rank, "pp") if message.stage is None else ranks
        senders = [
            started
            for started in sent.get(message, ())
            if ranks[started.row] in peers
            and started.time <= bar.start
            and _makes(plan, ranks[started.row], message)
        ]
        last = max(senders, default=Started(0.0, bar.row))
        if last.row != bar.row:
            out.append(Arrow(message.kind, message.module, last.row, bar.row, last.time, last.time))
    return out


def _inputs(plan: SchedulePlan, a: Action) -> list[Message]:
    """The messages that a computation waits for."""
    use = plan.modules[a.module]
    if a.kind is Kind.FORWARD:
        along = [Message(Kind.SEND_FORWARD, a.module, a.stage, None, a.microbatch)] if a.stage else []
        if a.module != plan.sink:
            return along
        entering = [m for m in plan.entering(a.stage) if m in plan.active[a.microbatch]]
        return [
            *along,
            *(Message(Kind.BOUNDARY_FORWARD, m, None, a.stage, a.microbatch) for m in entering),
        ]
    if a.kind is Kind.BACKWARD_WEIGHT:
        return []
    if a.stage + 1 < use.stages:
        return [Message(Kind.SEND_BACKWARD, a.module, a.stage, None, a.microbatch)]
    if a.module == plan.sink:
        return []
    return [Message(Kind.BOUNDARY_BACKWARD, a.module, None, s, i) for i in a.microbatches for s in use.enters]


def _makes(plan: SchedulePlan, rank: int, message: Message) -> bool:
    """Whether a rank that starts its end of a message sends rows, rather than only receiving them."""
    if message.stage is None:
        return True
    source, sink = plan.ends(message.module, message.stage)
    return plan.program_of[rank] in (source if message.kind is Kind.BOUNDARY_FORWARD else sink)


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"{len(ranks)} ranks from {ranks[0]}"


def _modules(plan: SchedulePlan, program: int) -> str:
    """The modules of a program's ranks, with the pipeline rank where there are several."""
    found = [
        m if plan.modules[m].layout.pp == 1 else f"{m} {pp + 1}/{plan.modules[m].layout.pp}"
        for m, pp in zip(plan.modules, plan.places[program], strict=True)
        if pp is not None
    ]
    return ", ".join(found)
