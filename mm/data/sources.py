"""The data set that a shard belongs to, told from its path: metrics have the loss of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

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


def _without_number(shard: str) -> tuple[str, ...]:
    """The parts of a shard's path, the last without ending and number, unless the number is all of it."""
    path = PurePath(shard)
    return *path.parent.parts, re.sub(r"[\W_]*\d+([\W_]*of[\W_]*\d+)?$", "", path.stem) or path.stem
