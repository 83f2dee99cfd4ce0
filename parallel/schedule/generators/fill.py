"""Encoder work in the idle time of the language model's pipeline (compare Optimus, arXiv 2408.03505).

The pipeline's order does not change. Each of its ranks computes encoder forwards and backwards where the cost
model has it wait: late ranks before their first micro-batch, early ranks between warm-up and first gradient,
all ranks after their last. Encoder actions of one micro-batch therefore happen at different times on
different ranks. Only encoders that need no collective across pipeline stages can do that.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    Kind,
)
from parallel.schedule.generators.orders import Work
from parallel.schedule.simulator.costs import Costs


@dataclass(frozen=True)
class Rules:
    """How eagerly encoder work is put before the pipeline's.

    early: a forward is due once less than (1 + early) times its duration is left until its rows are read.
    fit: idle time is used if it is at least `fit` times as long as the work.
    """

    early: float
    fit: float


RULES_TRIED = tuple(Rules(early, fit) for early in (0.0, 1.0, 2.0, 4.0) for fit in (0.0, 0.5, 1.0))


class Unit(NamedTuple):
    """Ranks that compute the same: those of one place.

    pp: their pipeline rank in the sink. stages: by encoder that they have, its stages.
    """

    pp: int
    stages: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Filler:
    """An encoder whose work fills idle time.

    spans: (first micro-batch, span) of its computations. stages: how many. learns: whether it has backwards.
    enters: the sink's stages that its rows enter.
    """

    spans: Sequence[tuple[int, int]]
    stages: int
    learns: bool
    enters: Sequence[int]


@dataclass(frozen=True)
class FillProblem:
    """A pipeline with idle time, and the encoder work to go into it.

    pipeline: the sink's works, by pipeline rank.
    starts: when each of them starts if the pipeline runs alone, in simulated seconds, by pipeline rank.
    stages: the sink's virtual stages.
    units: who computes.
    fillers: the encoders, by module.
    active: by micro-batch, the modules that have items in it.
    ahead: for how many micro-batches a rank may hold encoder activations; at least what the pipeline needs.
    """

    pipeline: Sequence[Sequence[Work]]
    starts: Sequence[Sequence[float]]
    stages: int
    units: Sequence[Unit]
    fillers: Mapping[str, Filler]
    active: Sequence[frozenset[str]]
    ahead: int
    costs: Costs


Done = tuple[Kind, str, int, int]  # (FORWARD or BACKWARD, module, stage, micro-batch)


@dataclass
class _Progress:
    """How far a unit has come in its lists."""

    pp: int
    sink: Sequence[Work]
    starts: Sequence[float]  # of the pipeline alone
    forwards: deque[Work]  # of encoders, not begun
    backwards: deque[Work]
    begun: int = 0  # works of the sink
    # Micro-batches between forward and backward, by encoder and stage.
    held: Counter[tuple[str, int]] = field(default_factory=Counter)
    busy: Work | None = None
    until: float = 0.0
    late: float = 0.0  # seconds that the pipeline is behind its time alone
    out: list[Work] = field(default_factory=list)


class NoProgress(ValueError):
    """Under some rules a bound on memory leaves nothing that a unit may do."""


def fill(given: FillProblem, rules: Rules) -> list[list[Work]]:
    """By unit, everything that it computes, in order. Raises NoProgress."""
    run = _Fill(given, rules)
    run.play()
    return [unit.out for unit in run.units]


class _Fill:
    def __init__(self, given: FillProblem, rules: Rules) -> None:
        self.given, self.rules = given, rules
        self.sink = given.pipeline[0][0].module
        self.units = [self._progress(unit) for unit in given.units]
        self.first = next(unit for unit in self.units if unit.pp == 0)
        # By what is done, on how many units it is still to be done.
        self.left = Counter((k, m, s, i) for u in self.units for w in u.sink for k, m, s, i in self._does(w))
        for unit in self.units:
            for w in (*unit.forwards, *unit.backwards):
                self.left.update(self._does(w))
        first = zip(self.first.sink, self.first.starts, strict=True)
        self.read_at = {w.microbatch: t for w, t in first if w.stage == 0 and w.kind is FORWARD}
        self.now = 0.0

    def _progress(self, unit: Unit) -> _Progress:
        """The start of a unit."""
        forwards, backwards = [], []
        for m, stages in unit.stages.items():
            filler = self.given.fillers[m]
            forwards += [Work(FORWARD, m, s, i, span) for i, span in filler.spans for s in stages]
            if filler.learns:
                spans = [(s, i, span) for i, span in filler.spans for s in reversed(stages)]
                backwards += [Work(BACKWARD, m, s, i, span) for s, i, span in spans]
        # Stable: the order of encoders and of their stages within a micro-batch.
        forwards.sort(key=lambda w: w.microbatch)
        backwards.sort(key=lambda w: w.microbatch)
        pp = unit.pp
        return _Progress(
            pp, self.given.pipeline[pp], self.given.starts[pp], deque(forwards), deque(backwards)
        )

    def play(self) -> None:
        """Simulate all units together: a free unit begins what the rules choose."""
        events: list[tuple[float, int]] = []
        while True:
            for n, unit in enumerate(self.units):
                if unit.busy is None and (work := self._choose(unit)) is not None:
                    self._begin(unit, work)
                    heapq.heappush(events, (unit.until, n))
            if not events:
                break
            self.now = events[0][0]
            while events and events[0][0] == self.now:
                self._end(self.units[heapq.heappop(events)[1]])
        if any(u.begun < len(u.sink) or u.forwards or u.backwards for u in self.units):
            raise NoProgress(str(self.rules))

    def _does(self, w: Work) -> list[Done]:
        """What is done when `w` is, on its unit."""
        if w.kind is BACKWARD_WEIGHT:
            return []
        kind = FORWARD if w.kind is FORWARD else BACKWARD
        return [(kind, w.module, w.stage, i) for i in range(w.microbatch, w.microbatch + w.span)]

    def _rows_of(self, w: Work) -> list[int]:
        """The micro-batches of an encoder's work that have items."""
        covered = range(w.microbatch, w.microbatch + w.span)
        return [i for i in covered if w.module in self.given.active[i]]

    def _seconds(self, w: Work) -> float:
        return self.given.costs.seconds(Action(w.kind, w.module, w.microbatch, stage=w.stage, span=w.span))

    def _begin(self, unit: _Progress, w: Work) -> None:
        unit.busy, unit.until = w, self.now + self._seconds(w)
        unit.out.append(w)
        if w.module == self.sink:
            unit.late = max(0.0, self.now - unit.starts[unit.begun])
            unit.begun += 1
        elif w.kind is FORWARD:
            unit.forwards.popleft()
            unit.held[w.module, w.stage] += w.span * self.given.fillers[w.module].learns
        else:
            unit.backwards.popleft()

    def _end(self, unit: _Progress) -> None:
        w, unit.busy = unit.busy, None
        assert w is not None
        if w.module != self.sink and w.kind is BACKWARD:
            unit.held[w.module, w.stage] -= w.span
        self.left.subtract(self._does(w))

    def _choose(self, unit: _Progress) -> Work | None:
        """What a free unit does now; None to wait."""
        forward = unit.forwards[0] if unit.forwards and self._ready(unit.forwards[0]) else None
        gradient = unit.backwards[0] if unit.backwards and self._ready(unit.backwards[0]) else None
        full = False
        if forward is not None:
            held = unit.held[forward.module, forward.stage]
            full = held + forward.span > self.given.ahead
        if full:
            forward = None  # until a backward makes room
        work = unit.sink[unit.begun] if unit.begun < len(unit.sink) else None
        if forward is not None:
            left = self.read_at[forward.microbatch] + self.first.late - self.now
            soon = self._seconds(work) if work is not None and self._ready(work) else 0.0
            follow = (
                self.given.fillers[forward.module].stages - forward.stage
            )  # this stage and those after it
            if left - soon < (follow + self.rules.early) * self._seconds(forward):
                return forward
        if work is None or not self._ready(work):
            other = gradient or forward
            if other is None or work is None:
                return other
            idle = self._ready_in(work)
            return other if idle is None or idle >= self.rules.fit * self._seconds(other) else None
        return gradient if gradient is not None and full else work

    def _ready(self, w: Work) -> bool:
        return not any(self.left[need] for need in self._needs(w))

    def _needs(self, w: Work) -> list[Done]:
        """What must be done on other units before `w`."""
        back = w.kind is not FORWARD
        if w.kind is BACKWARD_WEIGHT:
            return []
        if w.module == self.sink:
            if back:
                after = (BACKWARD, w.module, w.stage + 1, w.microbatch)
                return [after] if w.stage + 1 < self.given.stages else []
            if w.stage:
                return [(FORWARD, w.module, w.stage - 1, w.microbatch)]
            present = [m for m in self.given.fillers if m in self.given.active[w.microbatch]]
            return [(FORWARD, m, self.given.fillers[m].stages - 1, w.microbatch) for m in present]
        filler = self.given.fillers[w.module]
        if not back:
            return [(FORWARD, w.module, w.stage - 1, w.microbatch)] if w.stage else []
        if w.stage + 1 < filler.stages:
            return [(BACKWARD, w.module, w.stage + 1, w.microbatch)]
        return [(BACKWARD, self.sink, s, i) for s in filler.enters for i in self._rows_of(w)]

    def _ready_in(self, w: Work) -> float | None:
        """Seconds until what `w` waits for is done, if the units that lack it are computing it."""
        waits = []
        for need in self._needs(w):
            doing = [u.until for u in self.units if u.busy is not None and need in self._does(u.busy)]
            if self.left[need] > len(doing):
                return None
            waits += doing
        return max(waits) - self.now if waits else None
