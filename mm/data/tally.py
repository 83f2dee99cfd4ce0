"""How many samples and items a data set has, by shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.data.sample import Index, Sample, Tally


def tally_of(index: Index) -> Tally:
    """The samples of an index that are not left out: what select() has counted, else counted now."""
    if index.tally is not None:
        return index.tally
    count = getattr(index.samples, "tally", None)  # of samples in columns, as a model takes them
    if count is not None:
        found: Tally = count(index.usable.ids)
        return found
    number = {shard: k for k, shard in enumerate(index.shards)}
    items: dict[str, np.ndarray] = {}
    samples, truncated, split, portions = (np.zeros(len(number), dtype=np.int64) for _ in range(4))
    for sample in index.usable:
        at = number[sample.shard]
        samples[at] += 1
        portion = sample.portion
        truncated[at] += sample.truncated and portion is None
        portions[at] += portion is not None
        split[at] += portion is not None and portion.nth == 1
        for seg in sample.segments:
            if seg.part is not None:
                items.setdefault(seg.kind, np.zeros(len(number), dtype=np.int64))[at] += 1
    return Tally(samples, truncated, split, portions, dict(sorted(items.items())))


def shard_numbers(samples: Sequence[Sample], shards: Sequence[str], ids: Sequence[int]) -> list[int]:
    """By id, the number of its sample's shard."""
    of = getattr(samples, "shard_of", None)  # of samples in columns
    if of is not None:
        return [int(k) for k in of(np.asarray(ids, dtype=np.int64))]
    number = {shard: k for k, shard in enumerate(shards)}
    return [number[samples[i].shard] for i in ids]
