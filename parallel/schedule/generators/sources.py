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


@dataclass(frozen=True)
class FirstStageOrder:
    """The order of forwards and backwards at the sink's first stage.

    microbatches: how many forwards.
    backward: the micro-batches that have a backward, in order.
    forwards_before: by backward, how many forwards precede it.
    """

    microbatches: int
    backward: tuple[int, ...]
    forwards_before: tuple[int, ...]

    def forward_slot(self, microbatch: int, lead: int) -> Slot:
        """When a stage that is `lead` stages ahead of the sink computes a micro-batch."""
        before = self.forwards_before
        j = next((j for j, n in enumerate(before) if n + lead > microbatch), len(before))
        return Slot(j, 0, microbatch)

    def backward_slot(self, microbatch: int) -> Slot:
        """When the gradient of a micro-batch comes."""
        return Slot(bisect_left(self.backward, microbatch), 1, microbatch)

    def in_flight(self, size: int, lead: int = 0) -> int:
        """The most micro-batches that a source has in flight, between their forward and their backward.

        size: micro-batches in one group. lead: how many forwards of the sink early it computes a group.
        """
        begun = peak = 0
        for j, forwards in enumerate((*self.forwards_before, self.microbatches)):
            finished = self.backward[j - 1] + 1 if j else 0
            needed = min(forwards + lead, self.microbatches)
            while begun < needed:  # begin the group that holds the sink's next forward
                begun += min(size, self.microbatches - begun)
                peak = max(peak, begun - finished // size * size)
        return peak


def first_stage_order(first_rank: Sequence[Work]) -> FirstStageOrder:
    """The order at the sink's first stage, from the works of its first pipeline rank."""
    forwards, backward, forwards_before = 0, [], []
    for w in first_rank:
        if w.stage:
            continue
        if w.kind is FORWARD:
            forwards += 1
        elif w.kind is not BACKWARD_WEIGHT:
            backward.append(w.microbatch)
            forwards_before.append(forwards)
    return FirstStageOrder(forwards, tuple(backward), tuple(forwards_before))


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
    """Works of several sources on one rank, in the order of their slots."""
    found = [(slot, n, k, w) for n, works in enumerate(lists) for k, (slot, w) in enumerate(works)]
    return [w for *_, w in sorted(found, key=lambda f: f[:3])]
