"""Who computes what: samples to micro-batches and dp ranks of the language model, items to those of encoders.

Both are dealt by cost, and all micro-batches of a step at once. The set of samples of a step does not depend
on how they are dealt.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm.plan.table import Costs
from parallel.sequence.dealing import loads, longest_first
from parallel.sequence.intervals import Column, before, column, share_start

SLACK = 1e-9  # relative; sums of costs in another order differ by less
EVEN = 1.01  # cost of a dp rank over the mean from which on it is evened out
ROOM = 1.1  # cost of a dp rank in a micro-batch over the mean that evening out a step may always take
SPREAD = 1.5  # an encoder's share of its costliest micro-batch over an even share that is always allowed


class Seats(NamedTuple):
    """Where samples go, a line a sample: its micro-batch, and the dp rank of the language model there."""

    microbatch: Column
    dp: Column


def by_count(samples: int, microbatches: int, dp: int) -> Seats:
    """Samples in order, in shares of nearly equal number."""
    microbatch = _owners(np.asarray([samples]), microbatches)
    return Seats(microbatch, _owners(np.bincount(microbatch, minlength=microbatches), dp))


def _owners(sizes: Column, parts: int) -> Column:
    """By thing, which of `parts` shares of its group it falls into, where groups of these sizes follow one
    another; shares as by share_start()."""
    bounds = share_start(sizes[:, None], parts, np.arange(parts + 1))
    return np.repeat(np.tile(np.arange(parts), len(sizes)), np.diff(bounds).reshape(-1))


def deal_samples(cost: Costs, tokens: Column, others: Sequence[Costs], microbatches: int, dp: int) -> Seats:
    """Deal samples so that every (micro-batch, dp rank) has an equal cost, as far as samples allow.

    cost, tokens: of each sample in the language model, [samples]. others: of each sample in each encoder.

    Bins, one a (micro-batch, dp rank), are filled by longest_first(). Where costs of samples differ so much
    that bins do too, bins of like cost share a micro-batch, as its dp ranks wait for the costliest: no other
    grouping of these bins has a smaller sum of the costliest dp ranks over micro-batches. By construction:

    - No dp rank of a micro-batch has more tokens than the fullest of by_count(), so that activations need no
      more memory, nor a higher cost than the costliest of by_count().
    - An encoder's costliest micro-batch is at most SPREAD times an even share, or what it is by_count(),
      where some grouping allows that.

    Where by_count() is as even, it is kept. O(n log n) for n samples and bins.
    """
    plain = by_count(len(cost), microbatches, dp)
    if not len(cost) or microbatches * dp == 1:
        return plain
    old = _Loads.of(plain, cost, tokens, microbatches, dp)
    allowed = [
        max(SPREAD * float(own.sum()) / microbatches, _most(own, plain.microbatch, microbatches))
        for own in others
    ]
    found, least = plain, old.waited
    # Where attention dominates, equal costs are unequal lengths: bins of equal length may be what is allowed.
    for weight in (cost, tokens.astype(np.float64)):
        seats = _Bins.fill(weight, cost, microbatches, dp).seats(others, allowed)
        new = _Loads.of(seats, cost, tokens, microbatches, dp)
        within = new.longest <= old.longest and new.costliest <= old.costliest * (1 + SLACK)
        if within and new.waited < least * (1 - SLACK):
            found, least = seats, new.waited
    return found


class Packed(NamedTuple):
    """Samples in packed sequences. sequence: by sample, the number of its own. sequences: how many there are,
    also without a sample. capacity: most tokens of one."""

    sequence: Column
    sequences: int
    capacity: int


def deal_packed(
    cost: Costs, tokens: Column, packed: Packed, others: Sequence[Costs], microbatches: int, dp: int
) -> Seats:
    """Deal packed sequences so that every (micro-batch, dp rank) has an equal cost, as far as they allow.

    cost, tokens: of each sample in the language model. others: of each sample in each encoder.

    Every place gets one sequence, then every place a second one, and so on, each time the costliest to the
    place with least so far. So a dp rank packs at most ceil(sequences / places) times the capacity in a
    micro-batch, whatever the costs. Places of like cost then share a micro-batch, as in deal_samples(). At
    last samples leave dp ranks that have more than others (_evened).
    """
    n = min(packed.sequences, microbatches * dp)
    sums = loads(cost, packed.sequence, packed.sequences)
    costliest = np.argsort(-sums, kind="stable")
    place, load = np.empty(packed.sequences, dtype=np.int64), np.zeros(n)
    for start in range(0, packed.sequences, n):
        turn = costliest[start : start + n]
        least = np.argsort(load, kind="stable")[: len(turn)]
        place[turn] = least
        load[least] += sums[turn]
    plain = _owners(np.asarray([packed.sequences]), microbatches)[packed.sequence]
    allowed = [
        max(SPREAD * float(own.sum()) / microbatches, _most(own, plain, microbatches)) for own in others
    ]
    seats = _Bins.of(place[packed.sequence], load, microbatches, dp).seats(others, allowed)
    return _evened(seats, cost, tokens, -(-packed.sequences // n) * packed.capacity, microbatches, dp)


def _evened(seats: Seats, cost: Costs, tokens: Column, most_tokens: int, microbatches: int, dp: int) -> Seats:
    """Seats with samples taken from dp ranks whose step costs more than EVEN allows, to the dp rank of the
    same micro-batch that has least and room for them.

    No dp rank gets more than most_tokens in a micro-batch, nor costs more there than its costliest did, or
    ROOM times its mean. Encoders keep what they have in each micro-batch. O(samples of the ranks with too
    much, times dp).
    """
    place, out = seats.microbatch * dp + seats.dp, seats.dp.copy()
    load = loads(cost, place, microbatches * dp).reshape(microbatches, dp)
    room = most_tokens - loads(tokens.astype(np.float64), place, microbatches * dp).reshape(microbatches, dp)
    total, most = load.sum(axis=0), np.maximum(load.max(axis=1), ROOM * load.mean(axis=1))
    allowed = EVEN * float(total.mean())
    for rank in np.argsort(-total, kind="stable")[: int((total > allowed).sum())].tolist():
        own = np.flatnonzero(seats.dp == rank)
        for j in own[np.argsort(-cost[own], kind="stable")].tolist():
            k, n, x = int(seats.microbatch[j]), float(tokens[j]), float(cost[j])
            takes = (room[k] >= n) & (load[k] + x <= most[k]) & (total + x <= allowed)
            if total[rank] <= allowed or not takes.any():
                continue
            to = int(np.where(takes, total, np.inf).argmin())
            out[j] = to
            for change, of in ((x, load[k]), (x, total), (-n, room[k])):
                of[rank] -= change
                of[to] += change
    return Seats(seats.microbatch, out)


class _Loads(NamedTuple):
    """Of all dp ranks in all micro-batches: most tokens, highest cost, and what a step waits for: the
    costliest dp rank of each micro-batch, and once more the costliest of all, while a pipeline fills."""

    longest: int
    costliest: float
    waited: float

    @staticmethod
    def of(seats: Seats, cost: Costs, tokens: Column, microbatches: int, dp: int) -> _Loads:
        place, n = seats.microbatch * dp + seats.dp, microbatches * dp
        longest = np.bincount(place, tokens, n).max()
        most = loads(cost, place, n).reshape(microbatches, dp).max(axis=1)
        return _Loads(int(longest), float(most.max()), float(most.sum() + most.max()))


def _most(cost: Costs, microbatch: Column, microbatches: int) -> float:
    return float(loads(cost, microbatch, microbatches).max())


class _Bins(NamedTuple):
    """Bins in order of falling cost. bin: by sample, its own. cost: of each bin. used: by micro-batch, how
    many bins it takes. dp: of the language model."""

    bin: Column
    cost: Costs
    used: Column
    dp: int

    @staticmethod
    def fill(weight: Costs, cost: Costs, microbatches: int, dp: int) -> _Bins:
        """Fill bins with equal sums of `weight`; no more bins than samples."""
        n = min(len(weight), microbatches * dp)
        of = longest_first(weight, np.zeros(len(weight), dtype=np.int64), np.zeros((1, n))).bin
        return _Bins.of(of, loads(cost, of, n), microbatches, dp)

    @staticmethod
    def of(bin_of: Column, sums: Costs, microbatches: int, dp: int) -> _Bins:
        """Bins as they are filled. bin_of: by sample. sums: the cost of each bin."""
        n = len(sums)
        order = np.argsort(-sums, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(n)
        used = np.diff(np.arange(microbatches + 1) * n // microbatches)
        return _Bins(rank[bin_of], sums[order], used, dp)

    def seats(self, others: Sequence[Costs], allowed: Sequence[float]) -> Seats:
        """Bins of like cost share a micro-batch, as far as encoders' bounds allow."""
        width = 1
        while True:
            microbatch = self._grouped(width)
            of_sample, n = microbatch[self.bin], len(self.used)
            fits = all(
                _most(own, of_sample, n) <= most * (1 + SLACK)
                for own, most in zip(others, allowed, strict=True)
            )
            if fits or width >= n:
                return Seats(of_sample, self._ranks(microbatch)[self.bin])
            width *= 2

    def _grouped(self, width: int) -> Column:
        """By bin, its micro-batch, where `width` micro-batches at a time share out bins of like cost, to and
        fro. Costly micro-batches are spread over the step: a pipeline holds a few neighbours at once."""
        n = len(self.used)
        band = np.arange(n) // width
        # The nth bin of a micro-batch comes in the nth turn of its band; every other turn runs backwards.
        group = np.repeat(np.arange(n), self.used)
        turn = np.arange(len(group)) - np.repeat(before(self.used), self.used)
        order = np.lexsort((np.where(turn % 2, -group, group), turn, band[group]))
        # Multiples of an irrational number, here the golden ratio, fill the unit interval evenly.
        place = np.argsort(np.argsort(np.arange(n) * 2654435769 % 2**32, kind="stable"), kind="stable")
        # `used` differs by at most one between micro-batches: places are changed among equals only.
        place = _among_equals(place, self.used)
        return column(place[group[order]])

    def _ranks(self, microbatch: Column) -> Column:
        """By bin, its dp rank: in each micro-batch the costliest goes to the rank with least so far."""
        out, load = np.empty_like(microbatch), np.zeros(self.dp)
        order, at = np.argsort(microbatch, kind="stable"), 0
        for used in np.bincount(microbatch, minlength=len(self.used)).tolist():
            bins = order[at : at + used]
            ranks = np.argsort(load, kind="stable")[:used]
            out[bins] = ranks
            load[ranks] += self.cost[bins]
            at += used
        return out


def _among_equals(place: Column, size: Column) -> Column:
    """A permutation like `place`, which moves nothing to a place of another size."""
    out: Column = np.arange(len(place))
    for one in np.unique(size):
        same = np.flatnonzero(size == one)
        out[same] = same[np.argsort(np.argsort(place[same], kind="stable"), kind="stable")]
    return out


def home_ranks(microbatch: Column, dp_of: Column, dp: int, encoder_dp: int) -> Column:
    """By sample, the dp rank of an encoder that has its share: the samples of each dp rank of the language
    model, in order, are split over that part of the encoder's dp ranks which lies beside it."""
    place = microbatch * dp + dp_of
    order = np.argsort(place, kind="stable")
    size = np.bincount(place)
    nth = np.empty_like(place)
    nth[order] = np.arange(len(place)) - np.repeat(before(size), size)
    n = size[place]
    return column((dp_of * n + nth) * encoder_dp // (n * dp))


def deal_items(cost: Costs, microbatch: Column, home: Column, already: Costs) -> Column:
    """The dp rank of each item, so that loads are even in every micro-batch and few items leave home.

    cost, microbatch, home: by item. already: what each dp rank has to do besides, in the unit of the costs,
    [microbatches, dp]. The largest load of a micro-batch is at most that of longest_first().
    Within that bound an item stays on its home rank, where its rows need no transfer. O(n log n) for n items,
    and a round for each item of the rank with most.
    """
    microbatches, dp = already.shape
    if dp == 1:
        return np.zeros_like(home)
    spread = longest_first(cost, microbatch, already)
    bound = spread.load.max(axis=1)
    stays, load = _staying(cost, microbatch * dp + home, already.reshape(-1), np.repeat(bound, dp))
    kept = home.copy()
    leaving = np.flatnonzero(~stays)
    rest = longest_first(cost[leaving], microbatch[leaving], load.reshape(microbatches, dp))
    kept[leaving] = rest.bin
    good = rest.load.max(axis=1) <= bound * (1 + SLACK)
    return column(np.where(good[microbatch], kept, spread.bin))


def over_step(cost: Costs, microbatch: Column, dealt: Column, microbatches: int, dp: int) -> Column:
    """Items dealt to dp ranks so that sums over the step are even, for ranks where no item is at home.

    dealt: as deal_items() does it. Micro-batches come one after another, those that are dealt least evenly
    first. In each, the costliest item goes to the rank with least of the step so far that has then no more in
    this micro-batch than its costliest rank as dealt. Where sums differ by more than EVEN allows, a rank may
    have ROOM times the mean of a micro-batch. Where an item finds no rank, the micro-batch stays as dealt
    with ranks exchanged: the costliest share to the rank with least. O(n log n) for n items, and more where
    few ranks have room.
    """
    load = loads(cost, microbatch * dp + dealt, microbatches * dp).reshape(microbatches, dp)
    mean, most = load.mean(axis=1), load.max(axis=1)
    order = np.lexsort((-cost, microbatch))
    items = np.split(order, np.searchsorted(microbatch[order], np.arange(1, microbatches)))
    turns = np.argsort(-most / np.maximum(mean, np.finfo(float).tiny), kind="stable").tolist()
    best, least = dealt, float(load.sum(axis=0).max(initial=0.0))
    for bounds in (most, np.maximum(most, ROOM * mean)):
        out, total = dealt.copy(), np.zeros(dp)
        for k in turns:
            own = items[k]
            found = _within(cost[own], total, float(bounds[k]) * (1 + SLACK))
            if found is None:
                rank = np.empty(dp, dtype=np.int64)
                rank[np.argsort(-load[k], kind="stable")] = np.argsort(total, kind="stable")
                found = rank[dealt[own]]
            out[own] = found
            total += loads(cost[own], found, dp)
        if total.max() < least * (1 - SLACK):
            best, least = out, float(total.max())
        if least <= EVEN * total.mean():
            break
    return best


def _within(cost: Costs, total: Costs, bound: float) -> Column | None:
    """By item, the costliest first, the rank with least that has at most `bound` with it; None where an item
    finds none. total: what ranks have before."""
    heap = [(x, k) for k, x in enumerate(total.tolist())]
    heapq.heapify(heap)
    here, out = [0.0] * len(heap), list[int]()
    for x in cost.tolist():
        full = list[tuple[float, int]]()
        while heap and here[heap[0][1]] + x > bound:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        least, k = heap[0]
        heapq.heapreplace(heap, (least + x, k))
        here[k] += x
        out.append(k)
        for one in full:
            heapq.heappush(heap, one)
    return column(out)


def _staying(cost: Costs, place: Column, already: Costs, bound: Costs) -> tuple[np.ndarray, Costs]:
    """Which items stay at their place, the costliest first as long as they fit its bound: bool [n], and the
    load of each place."""
    order = np.lexsort((-cost, place))
    size = np.bincount(place, minlength=len(bound))
    first, load = before(size), already.copy()
    stays = np.zeros(len(cost), dtype=bool)
    for nth in range(int(size.max(initial=0))):
        here = np.flatnonzero(size > nth)
        item = order[first[here] + nth]
        after = load[here] + cost[item]
        fits = after <= bound[here]
        load[here] = np.where(fits, after, load[here])
        stays[item] = fits
    return stays, load


def load_imbalance(cost: Costs, microbatch: Column, dp_of: Column, microbatches: int, dp: int) -> Costs:
    """By micro-batch, the largest load of its dp ranks over their mean; 1 where there is no load."""
    load = loads(cost, microbatch * dp + dp_of, microbatches * dp).reshape(microbatches, dp)
    mean = load.mean(axis=1)
    out = np.ones(microbatches)
    np.divide(load.max(axis=1), mean, out=out, where=mean > 0)
    return out
