"""Where the work of sources (encoders) goes in a schedule of the sink (the language model). Pure.

Every source follows the order of forwards and backwards at the sink's first stage: its rows are needed in
that order, and its gradients come in that order. A disjoint source (no rank in common with the sink) is one
more pipeline stage ahead of the sink. A colocated source (ranks in common with the sink) computes groups of
micro-batches, each group at one moment on all of its ranks, so that its collectives meet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from parallel.schedule.action import BACKWARD, BACKWARD_WEIGHT, FORWARD
from parallel.schedule.generators.orders import Work


class Slot(NamedTuple):
    """Where a source's work lies in the order of the sink's first stage; slots compare in that order.

    backwards: how many backwards of the sink come before it. is_backward: whether it is a backward.
    microbatch: the first or the last that it covers.
    """

    backwards: int
    is_backward: int
    microbatch: int


class Grouping(NamedTuple):
    """How sources on ranks of the sink group their work.

    size: micro-batches in a group. lead: how many forwards of the sink's first stage earlier than needed a
    group is computed. slack: how many computations of the sink's first rank lie between a group's forward and
    the reader of its rows, and between its gradients and its backward: transfers run beside them.
    """

    size: int
    lead: int = 0
    slack: int = 0


@dataclass(frozen=True)
class FirstStageOrder:
    """The order of forwards and backwards at the sink's first stage.

    backward: the micro-batches that have a backward, in order.
    at_forward, at_backward: by forward and by backward, its index among all works of the first pipeline rank.
    """

    backward: tuple[int, ...]
    at_forward: tuple[int, ...]
    at_backward: tuple[int, ...]

    @property
    def microbatches(self) -> int:
        """How many forwards."""
        return len(self.at_forward)

    def forward_index(self, microbatch: int, lead: int, slack: int = 0) -> int:
        """The index of the work before which a source computes a micro-batch, `lead` forwards early."""
        return max(0, self.at_forward[max(0, microbatch - lead)] - slack)

    def backward_index(self, microbatch: int, slack: int = 0) -> int:
        """The index of the work before which a source computes the backward of a micro-batch."""
        return self.at_backward[bisect_left(self.backward, microbatch)] + 1 + slack

    def forward_slot(self, microbatch: int, lead: int, slack: int = 0) -> Slot:
        """When a source that is `lead` forwards ahead of the sink computes a micro-batch."""
        return Slot(bisect_left(self.at_backward, self.forward_index(microbatch, lead, slack)), 0, microbatch)

    def backward_slot(self, microbatch: int, slack: int = 0) -> Slot:
        """When a source computes the backward of a micro-batch: when its gradient comes, or later."""
        if not slack:
            return Slot(bisect_left(self.backward, microbatch), 1, microbatch)
        # Before the forwards that are due then: it makes room for them.
        return Slot(bisect_left(self.at_backward, self.backward_index(microbatch, slack)), 0, -1)

    def in_flight(self, grouping: Grouping) -> int:
        """The most micro-batches that a source has in flight, between their forward and their backward; all
        where there is no backward."""
        if not self.backward:
            return self.microbatches
        events = []
        for start in range(0, self.microbatches, grouping.size):
            stop = min(start + grouping.size, self.microbatches)
            back = [i for i in self.backward[bisect_left(self.backward, start) :] if i < stop]
            if back:
                events.append((self.forward_slot(start, grouping.lead, grouping.slack), stop - start))
                events.append((self.backward_slot(back[-1], grouping.slack), start - stop))
        return max(accumulate((n for _, n in sorted(events)), initial=0))


def first_stage_order(first_rank: Sequence[Work]) -> FirstStageOrder:
    """The order at the sink's first stage, from the works of its first pipeline rank."""
    found = [(k, w) for k, w in enumerate(first_rank) if w.stage == 0 and w.kind is not BACKWARD_WEIGHT]
    back = [(k, w.microbatch) for k, w in found if w.kind is not FORWARD]
    return FirstStageOrder(
        backward=tuple(i for _, i in back),
        at_forward=tuple(k for k, w in found if w.kind is FORWARD),
        at_backward=tuple(k for k, _ in back),
    )


def source_spans(
    start: int, stop: int, size: int, active: Sequence[frozenset[str]], source: str
) -> list[tuple[int, int]]:
    """(first micro-batch, span) of each computation of the source in [start, stop).

    A span without items has none.
    """
    out = [(i, min(size, stop - i)) for i in range(start, stop, size)]
    return [(i, n) for i, n in out if any(source in active[k] for k in range(i, i + n))]


def disjoint_works(
    source: str,
    stage: int,
    lead: int,
    order: FirstStageOrder,
    active: Sequence[frozenset[str]],
    size: int,
    backward: bool,
) -> list[tuple[Slot, Work]]:
    """Works of one stage of a source that shares no rank with the sink.

    lead: how many stages it is ahead of the sink. size: micro-batches in one computation.
    """
    out = []
    for i, span in source_spans(0, order.microbatches, size, active, source):
        out.append((order.forward_slot(i, lead), Work(FORWARD, source, stage, i, span)))
        if backward:
            # The gradient is complete when that of the last micro-batch with items is.
            final = max(k for k in range(i, i + span) if source in active[k])
            out.append((order.backward_slot(final), Work(BACKWARD, source, stage, i, span)))
    return out


@dataclass(frozen=True)
class MicrobatchGroup:
    """Micro-batches [start, stop) whose forwards, or backwards, colocated sources compute together."""

    start: int
    stop: int
    backward: bool

    def works(
        self, source: str, stages: Sequence[int], active: Sequence[frozenset[str]], size: int
    ) -> list[Work]:
        """What a rank with these stages of a source computes of the group, `size` micro-batches at once."""
        kind = BACKWARD if self.backward else FORWARD
        found = source_spans(self.start, self.stop, size, active, source)
        order = reversed(stages) if self.backward else stages
        return [Work(kind, source, s, i, span) for s in order for i, span in found]


def microbatch_groups(microbatches: int, size: int, train: bool) -> list[MicrobatchGroup]:
    """All groups of `size` micro-batches, forward and, in training, backward."""
    spans = [(i, min(i + size, microbatches)) for i in range(0, microbatches, size)]
    return [MicrobatchGroup(a, b, back) for a, b in spans for back in ((False, True) if train else (False,))]


def insert(
    sink: Sequence[Work], starts: Sequence[float], inserted: Sequence[tuple[float, Sequence[Work]]]
) -> list[Work]:
    """The sink's works of one rank with sources' works inserted.

    starts: when each work of the sink starts. inserted: (time, works); the works go before what starts then.
    Inserting at one time on all ranks keeps every order: what starts earlier depends on nothing that starts
    later.
    """
    out: list[Work] = []
    at = 0
    for time, works in inserted:
        k = max(at, bisect_left(starts, time - 1e-9))
        out += [*sink[at:k], *works]
        at = k
    return out + list(sink[at:])


def by_slot(lists: Sequence[Sequence[tuple[Slot, Work]]]) -> list[Work]:
    """Works of several stages of sources on one rank, in the order of their slots: of one slot forwards from
    the first list on, backwards from the last."""
    found = [
        (slot, n if w.kind is FORWARD else -n, k, w)
        for n, works in enumerate(lists)
        for k, (slot, w) in enumerate(works)
    ]
    return [w for *_, w in sorted(found, key=lambda f: f[:3])]
