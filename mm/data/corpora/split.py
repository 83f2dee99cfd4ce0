"""Which samples are held out: all or none of those that have a name, a picture or a recording in common."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence


def groups(marks: Sequence[Collection[str]]) -> list[int]:
    """By thing, the first thing that it is linked to, over any number of things with a mark in common.

    marks: by thing, what it shares with others of its group, such as the sum of a file. Nearly O(marks).
    """
    first = list(range(len(marks)))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    seen: dict[str, int] = {}
    for i, own in enumerate(marks):
        for mark in own:
            a, b = sorted((root(i), root(seen.setdefault(mark, i))))
            first[b] = a
    return [root(i) for i in range(len(marks))]


def is_held_out(name: str, seed: int, share: float) -> bool:
    """Whether the group of this name is held out; of many groups a `share` is. No other group matters."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
