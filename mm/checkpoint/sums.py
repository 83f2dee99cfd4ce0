"""Which samples of a shard have changed since a checkpoint was written.

A checkpoint has digests of each shard. samples.sums beside it has four bytes a sample, 40 MB for 10 million.
It is written with the first checkpoint of a run, and once more where the shards are others then. It is a
help: where it is missing or damaged, only the shard is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm.data.columns.file import content_of, read_file, write_file
from mm.data.columns.samples import Samples
from mm.data.columns.table import Spec, Table
from mm.data.sample import Index, ShardSums

SUMS = "samples.sums"  # beside the checkpoints of a run
MOST = 4  # samples that are named
_SPEC = Spec(
    "polyrank sums 1",
    {"shards": np.dtype([("texts", "S16"), ("parts", "S16")]), "sums": np.dtype("<u4")},
    {},
)


def keep_sums(directory: Path, index: Index) -> None:
    """Have the sums of a data set's samples in a run's folder. O(shards) where they are there already."""
    samples = _samples(index)
    if samples is None:
        return
    wanted = np.asarray([s[2:] for s in samples.shard_sums], dtype=_SPEC.columns["shards"])
    there = _read(directory)
    if there is not None and np.array_equal(there.columns["shards"], wanted):
        return
    sums = [samples.sums(n) for n in range(len(samples.shards))]
    ends = np.cumsum([0, *map(len, sums)], dtype=np.int64)
    columns = {"shards": wanted, "sums": np.concatenate(sums).astype("<u4")}
    first = {"shards": np.arange(len(wanted) + 1), "sums": ends}
    write_file(directory / SUMS, content_of(Table(_SPEC, columns, first, {})))


def changed_samples(directory: Path, index: Index, was: ShardSums, now: ShardSums) -> str:
    """Which samples of a shard are others, in words; "" where the run's folder does not say.

    was: of a checkpoint there. now: of the index. Names are not looked at. O(samples of the shard).
    """
    samples, table = _samples(index), _read(directory)
    if samples is None or table is None:
        return ""
    shards = table.columns["shards"]
    there = np.flatnonzero((shards["texts"] == was.texts.encode()) & (shards["parts"] == was.parts.encode()))
    number = next((n for n, s in enumerate(samples.shard_sums) if s[1:] == now[1:]), None)
    if not len(there) or number is None:
        return ""
    keys = list(samples.keys(*samples.first[number : number + 2].tolist()))
    return _said(table.rows("sums", int(there[0])), samples.sums(number), keys)


def _said(was: NDArray[Any], now: NDArray[Any], keys: list[bytes]) -> str:
    """keys: of the samples as they are now."""
    other, gone = (np.flatnonzero(~np.isin(a, b)).tolist() for a, b in ((now, was), (was, now)))
    names = [keys[n].decode("utf-8", "replace") for n in other]
    if len(was) == len(now):
        return f"changed: {_first(names)}" if names else "in another order"
    found = []
    if names:
        found.append(f"{'changed or new' if gone else 'new'}: {_first(names)}")
    if gone:
        found.append(f"{'changed or gone' if names else 'gone'}, counted from 0: {_first(gone)}")
    return "; ".join(found)


def _first(found: list[Any]) -> str:
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(map(str, found[:MOST])) + more


def _samples(index: Index) -> Samples | None:
    """The samples of shards behind an index, as they are written."""
    found = getattr(index.samples, "base", index.samples)
    return found if isinstance(found, Samples) else None


def _read(directory: Path) -> Table | None:
    try:
        return read_file(directory / SUMS, _SPEC)
    except OSError:
        return None
