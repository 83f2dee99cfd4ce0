"""Which samples a step takes: a pure function of (seed, step, known-bad samples)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mm.data.sample import Sample, Segment, grouped
from mm.errors import DataError


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def sample_ids(seed: int, step: int, global_batch: int, n: int, bad: frozenset[int]) -> tuple[int, ...]:
    """Sample ids of a step, from n samples: each epoch is a permutation, and steps run through the epochs.

    A bad sample is replaced by another draw, which depends on the seed and the bad sample's position in the
    run alone: a sample that is found to be bad moves no other sample. Raises DataError where all are bad.
    """
    if len(bad) >= n:
        raise DataError(f"all {n} samples are unreadable or left out")
    position = step * global_batch + np.arange(global_batch)  # in the run, counted over all steps
    found = np.empty(global_batch, dtype=np.int64)
    for epoch in np.unique(position // n).tolist():
        here = position // n == epoch
        found[here] = _epoch(seed, epoch, n)[position[here] % n]
    if bad:
        for k in np.flatnonzero(np.isin(found, list(bad))).tolist():
            found[k] = _another(seed, int(position[k]), n, bad)
    return tuple(found.tolist())


def _another(seed: int, position: int, n: int, bad: frozenset[int]) -> int:
    """A good sample in place of the bad one at this position."""
    draws = np.random.default_rng([seed, position, n])
    while True:
        found = int(draws.integers(n))
        if found not in bad:
            return found


def permute_items(samples: Sequence[Sample], module: str, seed: int) -> list[Sample]:
    """The samples with `module`'s items exchanged between them; each sample keeps its number of items.

    Slots are put in a random order, and each takes the item of the next slot. Where that is an item of its
    own sample, two slots swap, so that every item goes to another sample where that is possible.
    """
    groups = [grouped(s.segments) for s in samples]
    slots = [
        (j, k)
        for j, own in enumerate(groups)
        for k, group in enumerate(own)
        if any(seg.part is not None and seg.kind == module for seg in group)
    ]
    if len(slots) < 2:
        return list(samples)
    rng = np.random.default_rng([seed, len(slots)])
    order = rng.permutation(len(slots))
    givers = np.roll(order, -1)
    for i in range(len(order)):
        if slots[order[i]][0] == slots[givers[i]][0]:
            for j in rng.permutation(len(order)):
                own_i, own_j = slots[order[i]][0], slots[order[j]][0]
                if slots[givers[j]][0] != own_i and slots[givers[i]][0] != own_j:
                    givers[i], givers[j] = givers[j], givers[i]
                    break
    new: dict[tuple[int, int], tuple[Segment, ...]] = {}
    for taker, giver in zip(order, givers, strict=True):
        j, k = slots[giver]
        new[slots[taker]] = groups[j][k]
    return [
        replace(s, segments=tuple(seg for k, group in enumerate(own) for seg in new.get((j, k), group)))
        for j, (s, own) in enumerate(zip(samples, groups, strict=True))
    ]
