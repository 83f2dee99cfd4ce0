"""Where the work of sources (encoders) goes in a schedule of the sink. Pure.

The sequence of forwards and backwards at the sink's first stage is what every source follows: its rows are
wanted in that order and its gradients come in that order. A source on other ranks is a pipeline stage
further ahead; one on ranks of the sink computes groups of micro-batches at moments that are the same on all
its ranks, so that its collectives meet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.schedule.action import BACKWARD, BACKWARD_WEIGHT, FORWARD
from parallel.schedule.generators.orders import Work

Slot = tuple[int, int, int]  # sorts a source's works: (backwards of the sink before it, is backward, where)


@dataclass(frozen=True)
class Beat:
    """The sequence at the sink's first stage.

    microbatches: how many; backward: those that have one, in order; before[j]: how many forwards precede the
    j-th backward.
    """

    microbatches: int
    backward: tuple[int, ...]
    before: tuple[int, ...]

    def forward_slot(self, microbatch: int, lead: int) -> Slot:
        """When a stage `lead` stages ahead of the sink computes a micro-batch."""
        j = next((j for j, n in enumerate(self.before) if n + lead > microbatch), len(self.before))
        return (j, 0, microbatch)

    def backward_slot(self, microbatch: int) -> Slot:
        """When its gradient comes."""
        return (bisect_left(self.backward, microbatch), 1, microbatch)

    def held(self, group: int, lead: int = 0) -> int:
        """How many micro-batches a source holds at once that computes groups of so many, `lead` forwards of
        the sink early."""
        forward = done = peak = 0
        for j, n in enumerate((*self.before, self.microbatches)):
            done = self.backward[j - 1] + 1 if j else 0
            while forward < min(
                n + lead, self.microbatches
            ):  # the group that holds the next forward of the sink
                forward += min(group, self.microbatches - forward)
                peak = max(peak, forward - done // group * group)
        return peak


def beat(first_rank: Sequence[Work]) -> Beat:
    """The beat of the sink's works on its first pipeline rank, in order."""
    forwards, backward, before = 0, [], []
    for w in first_rank:
        if w.stage:
            continue
        if w.kind is FORWARD:
            forwards += 1
        elif w.kind is not BACKWARD_WEIGHT:
            backward.append(w.microbatch)
            before.append(forwards)
    return Beat(forwards, tuple(backward), tuple(before))


def chunks(
    start: int, stop: int, size: int, active: Sequence[frozenset[str]], source: str
) -> list[tuple[int, int]]:
    """(first micro-batch, span) of the source's computations in a range; none for one without items."""
    out = [(i, min(size, stop - i)) for i in range(start, stop, size)]
    return [(i, n) for i, n in out if any(source in active[k] for k in range(i, i + n))]


def apart(
    source: str,
    stage: int,
    lead: int,
    at: Beat,
    active: Sequence[frozenset[str]],
    size: int,
    backward: bool,
) -> list[tuple[Slot, Work]]:
    """Works of one stage of a source that shares no rank with the sink, `lead` stages ahead of it.

    size: micro-batches in one computation.
    """
    out = []
    for i, span in chunks(0, at.microbatches, size, active, source):
        out.append((at.forward_slot(i, lead), Work(FORWARD, source, stage, i, span)))
        if backward:
            # A chunk's gradient is whole when that of its last micro-batch with items is.
            final = max(k for k in range(i, i + span) if source in active[k])
            out.append((at.backward_slot(final), Work(BACKWARD, source, stage, i, span)))
    return out


@dataclass(frozen=True)
class Group:
    """Micro-batches [start, stop), whose forwards, or backwards, sources on ranks of the sink do together."""

    start: int
    stop: int
    backward: bool

    def works(
        self, source: str, stages: Sequence[int], active: Sequence[frozenset[str]], size: int
    ) -> list[Work]:
        """What the rank with these stages of a source computes of it."""
        kind = BACKWARD if self.backward else FORWARD
        found = chunks(self.start, self.stop, size, active, source)
        order = reversed(stages) if self.backward else stages
        return [Work(kind, source, s, i, span) for s in order for i, span in found]


def groups(microbatches: int, size: int, train: bool) -> list[Group]:
    """All groups of `size` micro-batches, forward and backward."""
    cuts = [(i, min(i + size, microbatches)) for i in range(0, microbatches, size)]
    return [Group(a, b, back) for a, b in cuts for back in ((False, True) if train else (False,))]


def insert(
    sink: Sequence[Work], starts: Sequence[float], beside: Sequence[tuple[float, Sequence[Work]]]
) -> list[Work]:
    """The sink's works of one rank, with their starts, and sources' works, each list before what starts then.

    Cutting all ranks at one moment keeps order: what starts before it depends on nothing that starts after.
    """
    out: list[Work] = []
    at = 0
    for moment, works in beside:
        k = max(at, bisect_left(starts, moment - 1e-9))
        out += [*sink[at:k], *works]
        at = k
    return out + list(sink[at:])


def by_slot(lists: Sequence[Sequence[tuple[Slot, Work]]]) -> list[Work]:
    """Works of several sources on one rank, in the order that their slots give."""
    found = [(slot, n, k, w) for n, works in enumerate(lists) for k, (slot, w) in enumerate(works)]
    return [w for *_, w in sorted(found, key=lambda f: f[:3])]
