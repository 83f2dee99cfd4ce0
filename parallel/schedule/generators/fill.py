"""Encoder work in the idle time of the language model's pipeline (compare Optimus, arXiv 2408.03505).

The pipeline's order does not change. Each of its ranks computes encoder forwards and backwards where the cost
model has it wait: late ranks before their first micro-batch, early ranks between warm-up and first gradient,
all ranks after their last. Encoder actions of one micro-batch therefore happen at different times on
different ranks. Only encoders that need no collective across pipeline stages can do that.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
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


@dataclass
class _Rank:
    """How far a pipeline rank has come in its lists."""

    sink: Sequence[Work]
    starts: Sequence[float]  # of the pipeline alone
    begun: int = 0  # works of the sink
    forwards: int = 0  # encoder forwards begun
    backwards: int = 0  # encoder backwards begun
    # Micro-batches between forward and backward, by encoder.
    held: Counter[str] = field(default_factory=Counter)
    busy: Work | None = None
    until: float = 0.0
    late: float = 0.0  # seconds that the pipeline is behind its time alone
    out: list[tuple[float, Work]] = field(default_factory=list)


@dataclass(frozen=True)
class FillProblem:
    """A pipeline with idle time, and the encoder work to go into it.

    pipeline: the sink's works, by pipeline rank.
    starts: when each of them starts if the pipeline runs alone, in simulated seconds, by pipeline rank.
    stages: the sink's virtual stages.
    forwards: the encoders' forwards, by micro-batch, the same on every rank.
    learn: the encoders that have backwards.
    enters: by encoder, the sink's stages that its rows enter.
    active: by micro-batch, the encoders that have items in it.
    ahead: for how many micro-batches a rank may hold encoder activations; at least what the pipeline needs.
    """

    pipeline: Sequence[Sequence[Work]]
    starts: Sequence[Sequence[float]]
    stages: int
    forwards: Sequence[Work]
    learn: Collection[str]
    enters: Mapping[str, Sequence[int]]
    active: Sequence[frozenset[str]]
    ahead: int
    costs: Costs


def fill(given: FillProblem, rules: Rules) -> list[list[Work]]:
    """By pipeline rank, everything that it computes, in order."""
    run = _Fill(given, rules)
    run.play()
    return run.lists()


class _Fill:
    def __init__(self, given: FillProblem, rules: Rules) -> None:
        self.given, self.rules = given, rules
        self.ranks = [_Rank(works, at) for works, at in zip(given.pipeline, given.starts, strict=True)]
        self.gradients = [w._replace(kind=BACKWARD) for w in given.forwards if w.module in given.learn]
        # (kind, stage, micro-batch) of the sink; an input gradient counts as the backward
        self.done: set[tuple[Kind, int, int]] = set()
        self.rows = [0] * len(given.active)  # encoder forwards done, over ranks and encoders
        first = zip(given.pipeline[0], given.starts[0], strict=True)
        self.read_at = {w.microbatch: t for w, t in first if w.stage == 0 and w.kind is FORWARD}
        # By (stage of the sink, micro-batch), when its gradient left.
        self.returned: dict[tuple[int, int], float] = {}
        self.now = 0.0

    def play(self) -> None:
        """Simulate all ranks together: a free rank begins what the rules choose."""
        events: list[tuple[float, int]] = []
        while True:
            for r, rank in enumerate(self.ranks):
                if rank.busy is None and (work := self._choose(rank)) is not None:
                    self._begin(rank, work)
                    heapq.heappush(events, (rank.until, r))
            if not events:
                break
            self.now = events[0][0]
            while events and events[0][0] == self.now:
                self._end(self.ranks[heapq.heappop(events)[1]])
        assert all(r.begun == len(r.sink) and r.backwards == len(self.gradients) for r in self.ranks), (
            "no progress"
        )

    def lists(self) -> list[list[Work]]:
        """The works of each rank."""
        return [[w for _, w in rank.out] for rank in self.ranks]

    def _rows_of(self, w: Work) -> list[int]:
        """The micro-batches of an encoder's work that have items."""
        covered = range(w.microbatch, w.microbatch + w.span)
        return [i for i in covered if w.module in self.given.active[i]]

    def _seconds(self, w: Work) -> float:
        return self.given.costs.seconds(Action(w.kind, w.module, w.microbatch, stage=w.stage, span=w.span))

    def _begin(self, rank: _Rank, w: Work) -> None:
        rank.busy, rank.until = w, self.now + self._seconds(w)
        rank.out.append((self.now, w))
        if w.module == rank.sink[0].module:
            rank.late = max(0.0, self.now - rank.starts[rank.begun])
            rank.begun += 1
        elif w.kind is FORWARD:
            rank.forwards += 1
            rank.held[w.module] += w.span * (w.module in self.given.learn)
        else:
            rank.backwards += 1

    def _end(self, rank: _Rank) -> None:
        w, rank.busy = rank.busy, None
        assert w is not None
        if w.module != rank.sink[0].module:
            if w.kind is BACKWARD:
                rank.held[w.module] -= w.span
            else:
                for i in self._rows_of(w):
                    self.rows[i] += 1
            return
        kind = BACKWARD if w.kind is BACKWARD_INPUT else w.kind
        self.done.add((kind, w.stage, w.microbatch))
        if kind is BACKWARD:
            self.returned[w.stage, w.microbatch] = self.now

    def _choose(self, rank: _Rank) -> Work | None:
        """What a free rank does now; None to wait."""
        forward = self.given.forwards[rank.forwards] if rank.forwards < len(self.given.forwards) else None
        gradient = self.gradients[rank.backwards] if rank.backwards < len(self.gradients) else None
        if gradient is not None and not self._came_back(gradient):
            gradient = None
        full = forward is not None and rank.held[forward.module] + forward.span > self.given.ahead
        if full:
            forward = None  # until a backward makes room
        work = rank.sink[rank.begun] if rank.begun < len(rank.sink) else None
        if forward is not None:
            left = self.read_at[forward.microbatch] + self.ranks[0].late - self.now
            soon = self._seconds(work) if work is not None and self._ready(work) else 0.0
            if left - soon < (1 + self.rules.early) * self._seconds(forward):
                return forward
        if work is None or not self._ready(work):
            other = gradient or forward
            if other is None or work is None:
                return other
            idle = self._ready_in(work)
            return other if idle is None or idle >= self.rules.fit * self._seconds(other) else None
        return gradient if gradient is not None and full else work

    def _came_back(self, w: Work) -> bool:
        return all((0, i) in self.returned for i in self._rows_of(w))  # the first stage's come last

    def _ready(self, w: Work) -> bool:
        if w.kind is FORWARD and w.stage == 0:
            return self.rows[w.microbatch] == len(self.ranks) * len(self.given.active[w.microbatch])
        need = self._need(w)
        return need is None or need in self.done

    def _need(self, w: Work) -> tuple[Kind, int, int] | None:
        if w.kind is FORWARD:
            return (FORWARD, w.stage - 1, w.microbatch)
        if w.kind is BACKWARD_WEIGHT or w.stage + 1 == self.given.stages:
            return None
        return (BACKWARD, w.stage + 1, w.microbatch)

    def _ready_in(self, w: Work) -> float | None:
        """Seconds until what `w` waits for is done, if another rank is computing it."""
        need = self._need(w)
        for other in self.ranks:
            b = other.busy
            if b is not None and need is not None and (b.stage, b.microbatch) == need[1:]:
                same = b.module == w.module and (b.kind is FORWARD) == (need[0] is FORWARD)
                if same and b.kind is not BACKWARD_WEIGHT:
                    return other.until - self.now
        return None
