"""Encoder work in the idle time of the language model's pipeline (compare Optimus, arXiv 2408.03505).

The pipeline's order stays as it is. Each of its ranks computes the encoders' forwards and backwards where, by
the cost model, it would wait: late ranks ahead of their first micro-batch, early ranks between warm-up and
first gradient, all after their last. So encoder actions of one micro-batch take place at different times on
different ranks, which only encoders can whose forward and backward need no collective across pipeline stages.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOUNDARY_BACKWARD,
    FORWARD,
    Action,
    Kind,
)
from parallel.schedule.costs import Costs
from parallel.schedule.orders import Work


@dataclass(frozen=True)
class Rules:
    """How eagerly encoder work goes before the pipeline's.

    early: a forward is due when less than so many times its own length are left until its rows are read.
    fit: idle time is used when it is at least so many times as long as the work.
    """

    early: float
    fit: float


TRIED = tuple(Rules(early, fit) for early in (0.0, 1.0, 2.0, 4.0) for fit in (0.0, 0.5, 1.0))


@dataclass
class _Rank:
    """What a pipeline rank has done of its lists."""

    sink: Sequence[Work]
    starts: Sequence[float]  # of the pipeline alone
    at: int = 0  # works of the sink begun
    ahead: int = 0  # encoder forwards begun
    back: int = 0  # encoder backwards begun
    held: Counter[str] = field(
        default_factory=Counter
    )  # micro-batches between forward and backward, by encoder
    busy: Work | None = None
    until: float = 0.0
    late: float = 0.0  # how far the pipeline is behind its time alone
    out: list[tuple[float, Work]] = field(default_factory=list)


def fill(
    pipeline: Sequence[Sequence[Work]],
    starts: Sequence[Sequence[float]],
    forwards: Sequence[Work],
    learn: Collection[str],
    active: Sequence[frozenset[str]],
    stages: int,
    ahead: int,
    costs: Costs,
    rules: Rules,
) -> list[list[Work]]:
    """Everything that each pipeline rank computes, in order.

    pipeline, starts: the sink's works and when they start alone, by rank; stages: how many virtual stages it
    has. forwards: the encoders' by micro-batch, the same on every rank; learn: the encoders with a backward.
    ahead: for how many micro-batches a rank may hold encoder activations, enough for the pipeline as it is.
    """
    run = _Fill(pipeline, starts, forwards, learn, active, stages, ahead, costs, rules)
    run.play()
    return run.lists()


class _Fill:
    def __init__(
        self,
        pipeline: Sequence[Sequence[Work]],
        starts: Sequence[Sequence[float]],
        forwards: Sequence[Work],
        learn: Collection[str],
        active: Sequence[frozenset[str]],
        stages: int,
        ahead: int,
        costs: Costs,
        rules: Rules,
    ) -> None:
        self.ranks = [_Rank(works, at) for works, at in zip(pipeline, starts, strict=True)]
        self.forwards, self.learn, self.active, self.stages = forwards, learn, active, stages
        self.ahead, self.costs, self.rules = ahead, costs, rules
        self.gradients = [w._replace(kind=BACKWARD) for w in forwards if w.module in learn]
        self.done: set[tuple[Kind, int, int]] = (
            set()
        )  # (kind, stage, micro-batch) of the sink, backward as one
        self.rows = dict.fromkeys(range(len(active)), 0)  # encoder forwards done, over ranks and encoders
        self.read_at = {
            w.microbatch: t
            for w, t in zip(pipeline[0], starts[0], strict=True)
            if w.stage == 0 and w.kind is FORWARD
        }
        self.returned: dict[int, float] = {}  # when a micro-batch's gradient left the sink
        self.now = 0.0

    def play(self) -> None:
        """Run all ranks side by side, each taking what its rules say whenever it is free."""
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
        assert all(r.at == len(r.sink) and r.back == len(self.gradients) for r in self.ranks), "no progress"

    def lists(self) -> list[list[Work]]:
        """The works of each rank; gradients start to come back when they leave the sink, on all ranks."""
        out = []
        for r, rank in enumerate(self.ranks):
            posts = [
                (t, Work(BOUNDARY_BACKWARD, w.module, 0, i))
                for w in self.gradients
                for i in range(w.microbatch, w.microbatch + w.span)
                if r and w.module in self.active[i]
                for t in (self.returned[i],)
            ]
            merged = sorted([*((t, 1, k, w) for k, (t, w) in enumerate(rank.out)), *self._number(posts)])
            out.append([w for *_, w in merged])
        return out

    def _number(self, posts: Sequence[tuple[float, Work]]) -> list[tuple[float, int, int, Work]]:
        return [(t, 0, k, w) for k, (t, w) in enumerate(posts)]

    def _seconds(self, w: Work) -> float:
        return self.costs.seconds(Action(w.kind, w.module, w.microbatch, stage=w.stage, span=w.span))

    def _begin(self, rank: _Rank, w: Work) -> None:
        rank.busy, rank.until = w, self.now + self._seconds(w)
        rank.out.append((self.now, w))
        if w.module == rank.sink[0].module:
            rank.late = max(0.0, self.now - rank.starts[rank.at])
            rank.at += 1
        elif w.kind is FORWARD:
            rank.ahead += 1
            rank.held[w.module] += w.span * (w.module in self.learn)
        else:
            rank.back += 1

    def _end(self, rank: _Rank) -> None:
        w, rank.busy = rank.busy, None
        assert w is not None
        if w.module != rank.sink[0].module:
            if w.kind is BACKWARD:
                rank.held[w.module] -= w.span
            else:
                for i in range(w.microbatch, w.microbatch + w.span):
                    self.rows[i] += w.module in self.active[i]
            return
        kind = BACKWARD if w.kind is BACKWARD_INPUT else w.kind
        self.done.add((kind, w.stage, w.microbatch))
        if kind is BACKWARD and w.stage == 0:
            self.returned[w.microbatch] = self.now

    def _choose(self, rank: _Rank) -> Work | None:
        """What a free rank does now; None to wait."""
        forward = self.forwards[rank.ahead] if rank.ahead < len(self.forwards) else None
        gradient = self.gradients[rank.back] if rank.back < len(self.gradients) else None
        if gradient is not None and not self._came_back(gradient):
            gradient = None
        full = forward is not None and rank.held[forward.module] + forward.span > self.ahead
        if full:
            forward = None  # until a backward makes room
        work = rank.sink[rank.at] if rank.at < len(rank.sink) else None
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
        covered = [i for i in range(w.microbatch, w.microbatch + w.span) if w.module in self.active[i]]
        return all(i in self.returned for i in covered)

    def _ready(self, w: Work) -> bool:
        if w.kind is FORWARD and w.stage == 0:
            return self.rows[w.microbatch] == len(self.ranks) * len(self.active[w.microbatch])
        need = self._need(w)
        return need is None or need in self.done

    def _need(self, w: Work) -> tuple[Kind, int, int] | None:
        if w.kind is FORWARD:
            return (FORWARD, w.stage - 1, w.microbatch)
        if w.kind is BACKWARD_WEIGHT or w.stage + 1 == self.stages:
            return None
        return (BACKWARD, w.stage + 1, w.microbatch)

    def _ready_in(self, w: Work) -> float | None:
        """Seconds until what `w` waits for is done, where another rank is at it."""
        need = self._need(w)
        for other in self.ranks:
            b = other.busy
            if b is not None and need is not None and (b.stage, b.microbatch) == need[1:]:
                same = b.module == w.module and (b.kind is FORWARD) == (need[0] is FORWARD)
                if same and b.kind is not BACKWARD_WEIGHT:
                    return other.until - self.now
        return None
