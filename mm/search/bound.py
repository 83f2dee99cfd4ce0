"""Bounds: seconds and bytes that no schedule of a candidate can do without. Pure.

They come from what each module asks of the ranks of its pipeline ranks, so they hold for a part of a
candidate too: what is not decided yet adds what its least option asks. The law that tests hold: no bound is
above what the simulated schedule takes (tests/mm/search/test_bound.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from mm.search.candidate import Block

# Sums in another order differ by rounding: a bound gives way by this share, so that equals stay equal.
ROUNDING = 1e-9


class Demand(NamedTuple):
    """What a module asks, at least, of the ranks that have it.

    Of computations, by virtual stage (stage s is on pipeline rank s % pp), in seconds of one micro-batch of
    mean load: forward; backward; early: of the backward, what the stage before waits for.
    mean, least: load of a mean micro-batch, and of the one with least; ends: of the sink's first and last
        one, None where they are not known. fixed: further seconds of a step.
    update: seconds of the optimizer, on the pipeline rank that takes longest. before: seconds from the start
        of the step until the first computation can begin, such as for a gather of weights. after: from the
        end of the last one. hop: seconds of hidden states from one stage to the next.
    held: by pipeline rank, bytes in any case; gradients: of these, once there are some. kept: by virtual
        stage, bytes from a forward of mean load to its backward; 0 where none follows. uneven: of these, the
        share that the mean rank's work may be less than the busiest's; thin: what the micro-batch with least
        keeps, over the mean one.
    share: of the seconds here, what the mean data rank has.
    """

    pp: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    early: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...]
    gradients: tuple[float, ...] = ()
    update: float = 0.0
    before: float = 0.0
    after: float = 0.0
    hop: float = 0.0
    mean: float = 1.0
    least: float = 0.0
    ends: tuple[float, float] | None = None
    fixed: float = 0.0
    uneven: float = 0.0
    thin: float = 0.0
    share: float = 1.0

    def stages(self, pp: int) -> range:
        """The virtual stages of a pipeline rank."""
        return range(pp, len(self.forward), self.pp)

    def seconds(self, pp: int, of: Sequence[float], microbatches: int) -> float:
        """Of some computations by stage, those of a pipeline rank in a step."""
        return sum(of[s] for s in self.stages(pp)) * microbatches * self.mean

    def work(self, pp: int, microbatches: int) -> float:
        """Seconds that a pipeline rank computes in a step."""
        both = self.seconds(pp, self.forward, microbatches) + self.seconds(pp, self.backward, microbatches)
        return both + self.fixed

    def keeps(self, pp: int) -> float:
        """Bytes that a pipeline rank keeps of a mean micro-batch, at least."""
        return self.mean * max(self.kept[s] for s in self.stages(pp))

    def through(self, *, backward: bool) -> float:
        """Seconds of the least micro-batch through all stages."""
        hops = self.hop * (len(self.forward) - 1)
        return self.least * sum(self.early if backward else self.forward) + (hops if self.least else 0.0)

    @property
    def heaviest(self) -> float:
        """Seconds of the micro-batch with most through all stages and back: it has the mean load at least."""
        return self.mean * (sum(self.forward) + sum(self.early))


@dataclass(frozen=True)
class Placed:
    """A module's demand on a block of ranks. shared: whether they are ranks of the sink."""

    demand: Demand
    block: Block
    shared: bool = True


class Open(NamedTuple):
    """A module whose degrees are not decided: its block, the least seconds that any of its options needs of
    each rank there, and the least bytes. share: of the seconds, what the mean data rank has. through: the
    least seconds of its heaviest micro-batch through all stages and back."""

    block: Block
    seconds: float
    bytes: float
    share: float = 1.0
    through: float = 0.0


class Floor(NamedTuple):
    """What the sink alone asks, whatever encoders ask beside it. alone: seconds from its first gather to the
    end of its last sum. through: of its least micro-batch through all stages and back. most, first: seconds
    that the pipeline rank with most work, and the first one, compute. update: seconds. bytes, first_bytes:
    that the fullest pipeline rank, and the first one, hold."""

    alone: float
    through: float
    most: float
    first: float
    update: float
    bytes: float
    first_bytes: float


def floor_of(sink: Demand, m: int) -> Floor:
    """Of a demand. O(stages)."""
    chain, ranks = _Chain(sink, (), m), range(sink.pp)
    held = [sink.held[pp] + (sink.gradients[pp] if sink.gradients else 0.0) for pp in ranks]
    return Floor(
        alone=max(chain.seconds(pp, (), sink.after) for pp in ranks),
        through=chain.between,
        most=max(sink.work(pp, m) for pp in ranks),
        first=sink.work(0, m),
        update=sink.update,
        bytes=max(held),
        first_bytes=held[0],
    )


class Others(NamedTuple):
    """What undecided encoders ask of ranks. all: seconds of each rank of the sink, and bytes; first: of those
    of its first pipeline rank, beside that; own: the most of ranks that it does not have. through: seconds
    of a micro-batch through one of them and back. total: seconds of all ranks together, of the mean data
    ranks."""

    all: tuple[float, float] = (0.0, 0.0)
    first: tuple[float, float] = (0.0, 0.0)
    own: tuple[float, float] = (0.0, 0.0)
    through: float = 0.0
    total: float = 0.0

    @staticmethod
    def of(sink: Block, first: Block, undecided: Iterable[Open]) -> Others:
        """first: ranks of the sink's first pipeline rank."""
        on = dict[Block, tuple[float, float]]()
        total = through = 0.0
        for u in undecided:
            through = max(through, u.through)
            seconds, held = on.get(u.block, (0.0, 0.0))
            on[u.block] = seconds + u.seconds, held + u.bytes
            total += u.share * u.seconds * u.block.size
        every = on.pop(sink, (0.0, 0.0))
        one = on.pop(first, (0.0, 0.0))
        own = max((x[0] for x in on.values()), default=0.0), max((x[1] for x in on.values()), default=0.0)
        return Others(every, one, own, through, total)


def floor_bound(floor: Floor, others: Others, cores: float = math.inf) -> tuple[float, float]:
    """seconds_bound() and bytes_bound() of a sink with encoders of which nothing is decided."""
    (every, held), (first, more) = others.all, others.first
    chain = others.through + floor.through if others.through else 0.0
    seconds = max(floor.alone, floor.most + every, floor.first + every + first, others.own[0], chain)
    seconds = max(seconds, others.total / cores) + floor.update
    filled = max(floor.bytes + held, floor.first_bytes + held + more, others.own[1])
    return seconds * (1 - ROUNDING), filled * (1 - ROUNDING)


def seconds_bound(
    sink: Placed,
    encoders: Iterable[Placed],
    undecided: Iterable[Open],
    m: int,
    cores: float = math.inf,
) -> float:
    """Seconds that a step of m micro-batches takes at least. cores: that all ranks share.

    A rank does one thing at a time, so all that its modules compute adds up, and after the last of it one of
    their sums ends. The sink's first forward waits for the encoders' and for those of the stages before, and
    after its last backward the gradients go back the same way. On the sink's ranks encoders' forwards come
    before the sink's last backward, and their backwards after its first forward. Each encoder has a
    micro-batch of mean load or more, which goes through all its stages, the sink's, and back. Updates of all
    modules follow one another.
    """
    encoders, undecided = list(encoders), list(undecided)
    chain = _Chain(sink.demand, encoders, m)
    open_ = max((u.through for u in undecided), default=0.0)
    found, total = max(chain.heaviest, open_ + chain.between if open_ else 0.0), 0.0
    for place, hosted in _places([sink, *encoders], undecided):
        more = [u for u in undecided if _inside(place, u.block)]
        work = sum(p.demand.work(pp, m) for p, pp in hosted) + sum(u.seconds for u in more)
        after = 0.0 if more else min((p.demand.after for p, _ in hosted), default=0.0)
        found = max(found, work + after)
        for p, pp in hosted:
            if p is sink:
                others = [(q.demand, k) for q, k in hosted if q is not sink]
                found = max(found, chain.seconds(pp, others, 0.0 if more else after))
            else:
                found = max(found, p.demand.before + p.demand.work(pp, m) + after * (len(hosted) == 1))
        shared = sum(p.demand.share * p.demand.work(pp, m) for p, pp in hosted)
        total += (shared + sum(u.share * u.seconds for u in more)) * place.size
    found = max(found, total / cores)
    updates = sum(p.demand.update for p in (sink, *encoders))
    return (found + updates) * (1 - ROUNDING)


class _Chain:
    """The step of the sink's pipeline."""

    def __init__(self, sink: Demand, encoders: Sequence[Placed], m: int) -> None:
        self.sink, self.m = sink, m
        self.start = max((e.demand.through(backward=False) for e in encoders), default=0.0)
        self.end = max((e.demand.through(backward=True) for e in encoders), default=0.0)
        self.between = sink.through(backward=False) + sink.through(backward=True)
        self.heaviest = max((e.demand.heaviest + self.between for e in encoders), default=0.0)

    def seconds(self, pp: int, others: Sequence[tuple[Demand, int]], after: float) -> float:
        """On a pipeline rank, with encoders on the same ranks. after: from its last computation on."""
        sink, m = self.sink, self.m
        first, last = sink.ends or (sink.least, sink.least)
        head = self.start + first * sum(sink.forward[:pp]) + sink.hop * pp
        head = max(head, sink.before)
        tail = last * sum(sink.early[:pp]) + sink.hop * pp + self.end
        early = sink.seconds(pp, sink.forward, m) + sink.seconds(pp, sink.early, m)
        before = sum(d.seconds(k, d.forward, m) for d, k in others)
        behind = sum(d.seconds(k, d.backward, m) for d, k in others)
        return max(
            head + early + tail,
            before + early + tail,
            head + sink.work(pp, m) + behind + after,
            head + sink.work(pp, m) + (sink.after if not others else 0.0),
        )


def bytes_bound(
    sink: Placed, encoders: Iterable[Placed], undecided: Iterable[Open], kind: str, m: int
) -> float:
    """Bytes that the fullest rank needs at least.

    While the sink has micro-batches in flight, encoders on the same ranks have the same ones. Encoders that
    share other ranks hold what the sink's first micro-batch needs at once.
    """
    encoders, undecided = list(encoders), list(undecided)
    found = 0.0
    for place, hosted in _places([sink, *encoders], undecided):
        held = sum(p.demand.held[pp] for p, pp in hosted)
        held += sum(u.bytes for u in undecided if _inside(place, u.block))
        gradients = sum(p.demand.gradients[pp] for p, pp in hosted if p.demand.gradients)
        at = next((pp for p, pp in hosted if p is sink), None)
        own = sink.demand.keeps(at) if at is not None else 0.0
        # The rank that is looked at has most of all its modules together, not of each.
        rest = sum(p.demand.keeps(pp) for p, pp in hosted if p is not sink)
        keeps = own + max(0.0, rest - own * sink.demand.uneven)
        flying = in_flight(kind, sink.demand.pp, at, m) if at is not None else 1.0
        later = 0.0  # in flight after the first backward
        if at is not None and kind == "1f1b" and m > sink.demand.pp - at:
            later = (sink.demand.pp - at) * sink.demand.thin
        found = max(found, held + flying * keeps, held + gradients + later * own)
    return found * (1 - ROUNDING)


def in_flight(kind: str, pp: int, rank: int, m: int) -> float:
    """Micro-batches of mean load that a pipeline rank of the sink has in flight at once, at least.

    In every pipeline but the sequential one rank r takes pp - r forwards before its first backward. Ragged
    ones weigh what they may: of ceil(m / n) windows of n that cover all m, the fullest weighs at least
    m / ceil(m / n).
    """
    n = 1 if kind == "sequential" else min(m, pp - rank)
    return m / math.ceil(m / n)


def _places(
    placed: Sequence[Placed], undecided: Sequence[Open]
) -> Iterable[tuple[Block, list[tuple[Placed, int]]]]:
    """Runs of ranks that stand alike in all modules, with the modules that are there and their pipeline
    ranks."""
    edges = {e for u in undecided for e in u.block}
    for p in placed:
        n = p.block.size // p.demand.pp
        edges |= set(range(p.block.start, p.block.stop + 1, n))
    for start, stop in pairwise(sorted(edges)):
        place = Block(start, stop)
        hosted = [
            (p, (start - p.block.start) // (p.block.size // p.demand.pp))
            for p in placed
            if _inside(place, p.block)
        ]
        yield place, hosted


def _inside(place: Block, block: Block) -> bool:
    return block.start <= place.start and place.stop <= block.stop
