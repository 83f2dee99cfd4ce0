"""The data set that a shard belongs to, told from its path: metrics have the loss of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.data.columns.samples import Samples
from mm.data.layouts.find import Spec
from mm.data.sample import Selection

MOST = 64  # sources with a name of their own
OTHERS = "others"


def source_names(shards: Sequence[str]) -> list[str]:
    """By shard, its source: the file's name without its number, after as many folders as tell sources apart.

    "coco/train-000001.tar" is of "train"; beside "sound/train-000000.tar" it is of "coco/train". The sources
    after the first MOST, in order of the shards, are OTHERS. O(shards times the depth of their folders).
    """
    paths = [_without_number(shard) for shard in shards]
    deepest = max((len(p) for p in paths), default=1)
    kinds = len(set(paths))
    depth = next(n for n in range(1, deepest + 1) if len({p[-n:] for p in paths}) == kinds)
    names = ["/".join(p[-depth:]).replace("//", "/") for p in paths]
    known = set(list(dict.fromkeys(names))[:MOST])
    return [name if name in known else OTHERS for name in names]


class Wanted(NamedTuple):
    """What is taken of some shards. patterns: of them. name: None where it is told from them. layout: how
    their samples are written; None: as those of all."""

    patterns: tuple[str, ...]
    name: str | None = None
    layout: Spec = None
    limit: int | None = None
    split: tuple[float, float] | None = None


def selected(
    samples: Samples, wanted: Sequence[tuple[Wanted, int]], names: Sequence[str]
) -> tuple[Selection, ...]:
    """What is taken of each source. wanted: with how many shards it has. names: by shard. O(1) a source, and
    O(samples) where it has a split."""
    out, shard = list[Selection](), 0
    for w, shards in wanted:
        first, stop = samples.first[[shard, shard + shards]].tolist()
        size = stop - first if w.limit is None else min(w.limit, stop - first)
        name = names[shard] if shards else w.name or ""
        out.append(
            Selection(name, first, size, None if w.split is None else _split(samples, first, size, w.split))
        )
        shard += shards
    return tuple(out)


def _split(samples: Samples, first: int, size: int, part: tuple[float, float]) -> NDArray[np.uint8]:
    """Which samples have the hash of their key in this part of [0, 1)."""
    keys = samples.keys(first, first + size)
    hashes = (int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "big") for key in keys)
    at = np.fromiter(hashes, dtype=np.float64, count=size) / 2.0**48
    return np.packbits((part[0] <= at) & (at < part[1]))


def _without_number(shard: str) -> tuple[str, ...]:
    """The parts of a shard's path, the last without ending and number, unless the number is all of it."""
    path = PurePath(shard)
    return *path.parent.parts, re.sub(r"[\W_]*\d+([\W_]*of[\W_]*\d+)?$", "", path.stem) or path.stem
