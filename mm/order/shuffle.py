"""A shuffle of [0, n), computed entry by entry: no permutation is held, and any entry is found in O(1).

It is a Feistel network on pairs (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002):
a number is (left, right) with left < a and right < b, where a b is n or little more. A round adds a hash of
one half to the other, which can be undone, so that the network is a permutation of [0, a b). What falls
outside [0, n) goes through the network again until it is inside (cycle walking).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from parallel.sequence.intervals import Column

Hashes = NDArray[np.uint64]
ROUNDS = 24  # few would do for many samples; of five samples all 120 orders come equally often from 24 on
_STEP = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction in 64 bits


def mixed(hashes: Hashes) -> Hashes:
    """A hash of 64-bit numbers, the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = hashes + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """A 64-bit key of numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def keyed(key: int, numbers: Column) -> Hashes:
    """64 bits for each of these numbers under a key."""
    return mixed(mixed(numbers.astype(np.uint64)) ^ np.uint64(key))


def shuffled(keys: Hashes, n: int, index: Column) -> Column:
    """Where the shuffle of [0, n) under each key has these entries: [m].

    keys: of the shuffle that each entry is looked up in, [m]. index: the entries, 0 <= index < n, [m].
    """
    out, left = index.astype(np.uint64), np.arange(len(index))
    while len(left):
        out[left] = _network(keys[left], n, out[left])
        left = left[out[left] >= n]
    return out.astype(np.int64)


def _network(keys: Hashes, n: int, x: Hashes) -> Hashes:
    a = np.uint64(math.isqrt(n - 1) + 1 if n > 1 else 1)
    # b is even: additions modulo an odd number are even permutations, of which there are half as many.
    b = np.uint64(-(-n // (2 * int(a))) * 2)
    left, right = x % a, x // a
    for k in range(0, ROUNDS, 2):
        left = (left + mixed(right ^ mixed(keys + np.uint64(k))) % a) % a
        right = (right + mixed(left ^ mixed(keys + np.uint64(k + 1))) % b) % b
    return left + a * right
