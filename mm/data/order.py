"""Items exchanged between samples, for an evaluation that tells what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mm.data.sample import Sample, Segment, grouped


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
