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

from mm.search.candidate import Block

# Sums in another order differ by rounding: a bound gives way by this share, so that equals stay equal.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Demand:
    """What a module asks, at least, of the ranks that have it.

    Of computations, by virtual stage (stage s is on pipeline rank s % pp), in seconds of one micro-batch of
    mean load: forward; backward; early: of the backward, what the stage before waits for.
    mean, least: load of a mean micro-batch, and of the one with least.
    update: by pipeline rank, seconds of the optimizer. before: seconds from the start of the step until the
        first computation can begin, such as for a gather of weights. after: from the end of the last one.
    held: by pipeline rank, bytes in any case. kept: by virtual stage, bytes from a forward of mean load to
        its backward; 0 where none follows.
    """

    pp: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    early: tuple[float, ...]
    update: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...]
    before: float = 0.0
    after: float = 0.0
    mean: float = 1.0
    least: float = 0.0

    def stages(self, pp: int) -> range:
        """The virtual stages of a pipeline rank."""
        return range(pp, len(self.forward), self.pp)

    def work(self, pp: int, microbatches: int) -> float:
        """Seconds that a pipeline rank computes in a step."""
        one = sum(self.forward[s] + self.backward[s] for s in self.stages(pp))
        return one * microbatches * self.mean + self.update[pp]

    def keeps(self, pp: int) -> float:
        """Bytes that a pipeline rank keeps of a mean micro-batch, at least."""
        return self.mean * max(self.kept[s] for s in self.stages(pp))

    def through(self, *, backward: bool) -> float:
        """Seconds of the least micro-batch through all stages."""
        return self.least * sum(self.early if backward else self.forward)


@dataclass(frozen=True)
class Placed:
    """A module's demand on a block of ranks. shared: whether they are ranks of the sink."""

    demand: Demand
    block: Block
    shared: bool = True


@dataclass(frozen=True)
class Open:
    """A module whose degrees are not decided: its block, the least seconds that any of its options needs of
    each rank there, and the least bytes."""

    block: Block
    seconds: float
    bytes: float


def seconds_bound(
    sink: Placed,
    encoders: Iterable[Placed],
    undecided: Iterable[Open],
    m: int,
    cores: float = math.inf,
) -> float:
    """Seconds that a step of m micro-batches takes at least. cores: that all ranks share.

    A rank does one thing at a time, so all that its modules compute adds up. The sink's first forward waits
    for the encoders' and for those of the stages before, and after its last backward the gradients go back
    the same way. Transfers take no time here.
    """
    encoders, undecided = list(encoders), list(undecided)
    found = total = 0.0
    for place, hosted in _places([sink, *encoders], undecided):
        work = sum(p.demand.work(pp, m) for p, pp in hosted)
        work += sum(u.seconds for u in undecided if _inside(place, u.block))
        found, total = max(found, work), total + work * place.size
    found = max(found, total / cores)
    start = max((e.demand.through(backward=False) for e in encoders), default=0.0)
    end = max((e.demand.through(backward=True) for e in encoders), default=0.0)
    for encoder in encoders:
        found = max(found, _waits(encoder.demand, m))
    return max(found, _chain(sink.demand, start, end, m)) * (1 - ROUNDING)


def _waits(demand: Demand, m: int) -> float:
    """The step of a module alone: its weights come, it computes, its gradients are summed."""
    ranks = range(demand.pp)
    return max(demand.before + demand.work(pp, m) - demand.update[pp] + demand.after for pp in ranks)


def _chain(sink: Demand, start: float, end: float, m: int) -> float:
    """The step of the sink's pipeline. start, end: before its first forward, and after its last backward."""
    found = 0.0
    for pp in range(sink.pp):
        head = max(start + sink.least * sum(sink.forward[:pp]), sink.before)
        tail = sink.least * sum(sink.early[:pp]) + end
        mine = sink.stages(pp)
        early = sum(sink.forward[s] + sink.early[s] for s in mine) * m * sink.mean
        work = sink.work(pp, m) - sink.update[pp]
        found = max(found, head + early + tail, head + work + max(sink.update[pp], sink.after))
    return found


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
        total = sum(p.demand.held[pp] for p, pp in hosted)
        total += sum(u.bytes for u in undecided if _inside(place, u.block))
        at = next((pp for p, pp in hosted if p is sink), None)
        flying = in_flight(kind, sink.demand.pp, at, m) if at is not None else 1.0
        total += flying * sum(p.demand.keeps(pp) for p, pp in hosted)
        found = max(found, total)
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


def least_of(demands: Iterable[Demand], m: int, least: float = math.inf) -> float:
    """The least seconds that any of some options needs of each of its ranks."""
    return min((min(d.work(pp, m) for pp in range(d.pp)) for d in demands), default=least)
