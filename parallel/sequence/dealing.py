"""Dealing loads to bins, the costliest first, for many independent problems at once. Pure.

The longest-processing-time rule gives each load, the costliest first, to the bin that has least so far, of
several such bins to the first. Its fullest bin is at most 4/3 - 1/(3 bins) times that of the best dealing
(R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17, 1969).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel.sequence.intervals import Column, before

Costs = NDArray[np.float64]

# A round over all problems takes about as long as so many loads of the loop over a heap.
ROUND = 100


class Dealt(NamedTuple):
    """bin: of each load, [n]. load: of each bin, [problems, bins]."""

    bin: Column
    load: Costs


def loads(costs: Costs, bin_of: Column, bins: int) -> Costs:
    """The sum of the costs in each bin, [bins]."""
    return np.bincount(bin_of, costs, bins).astype(np.float64)


def longest_first(costs: Costs, problem: Column, load: Costs) -> Dealt:
    """Deal loads of these costs, at least 0, by the longest-processing-time rule.

    problem: of each load; it goes to a bin of that problem. load: what bins have already, [problems, bins].
    Equal costs are dealt in their order. O(n log n) for n loads and O(b log b) a round for b bins over all
    problems; a round deals most of a bin's worth of loads to each problem.
    """
    problems, bins = load.shape
    order = np.lexsort((-costs, problem))
    count = np.bincount(problem, minlength=problems)
    some = costs[order] > 0
    # Few bins make short rounds.
    one_by_one = bins < 2 or len(costs) * bins < ROUND * int(count.max(initial=0))
    deal = _one_by_one if one_by_one else _in_rounds
    out, load = deal(costs[order], problem[order], count, load.copy())
    out[~some] = load.argmin(axis=1)[problem[order][~some]]
    found = np.empty(len(costs), dtype=np.int64)
    found[order] = out
    return Dealt(found, load)


def _one_by_one(costs: Costs, problem: Column, count: Column, load: Costs) -> Dealt:
    """longest_first() of loads in order of problem and cost, by a heap; those without cost are left."""
    out, at = np.zeros(len(costs), dtype=np.int64), 0
    for p in np.flatnonzero(count).tolist():
        heap = [(x, k) for k, x in enumerate(load[p].tolist())]
        heapq.heapify(heap)
        chosen = []
        for cost in costs[at : at + count[p]].tolist():
            least, k = heap[0]
            chosen.append(k)
            heapq.heapreplace(heap, (least + cost, k))
        out[at : at + count[p]] = chosen
        for x, k in heap:
            load[p, k] = x
        at += int(count[p])
    return Dealt(out, load)


def _in_rounds(costs: Costs, problem: Column, count: Column, load: Costs) -> Dealt:
    """The same in rounds: the next loads go to the least bins in order, up to the first bin that a bin of
    this round would come before."""
    bins = load.shape[1]
    out, first = np.zeros(len(costs), dtype=np.int64), before(count)
    # Loads without cost are at the end of each problem.
    left = np.bincount(problem[costs > 0], minlength=len(count))
    at = np.zeros_like(count)
    while len(active := np.flatnonzero(at < left)):
        width = min(bins, int((left - at)[active].max()))
        own = load[active]
        turn = np.argsort(own, axis=1, kind="stable")[:, :width]
        least = np.take_along_axis(own, turn, axis=1)
        nth = at[active, None] + np.arange(width)  # [active, width]
        given = nth < left[active, None]
        index = np.where(given, first[active, None] + nth, 0)
        cost = np.where(given, costs[index], 0.0)
        after = least + cost
        given[:, 1:] &= least[:, 1:] < np.minimum.accumulate(after, axis=1)[:, :-1]
        given = np.logical_and.accumulate(given, axis=1)
        out[index[given]] = turn[given]
        np.put_along_axis(own, turn, np.where(given, after, least), axis=1)
        load[active] = own
        at[active] += given.sum(axis=1)
    return Dealt(out, load)
