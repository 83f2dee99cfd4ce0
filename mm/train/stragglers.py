"""Who made the others wait in a step: by what ranks have told of their computations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MOST_RANKS = 64  # whose waiting is listed one by one; of larger jobs the slowest rank alone is told


@dataclass(frozen=True)
class Slowest:
    """The rank that computed longest.

    module: with which it spent most beyond the median of the module's ranks. seconds: in computations,
    without waiting for inputs. median_s: of all ranks that compute.
    """

    rank: int
    module: str
    seconds: float
    median_s: float


def slowest(own_s: Mapping[str, np.ndarray]) -> Slowest | None:
    """The slowest rank; None where nothing was computed.

    own_s: by module, each rank's seconds in its computations without waiting for inputs [ranks].
    """
    total = np.sum([*own_s.values()], axis=0)
    if not total.any():
        return None
    rank = int(total.argmax())
    beyond = {m: float(s[rank] - np.median(s[s > 0])) for m, s in own_s.items() if s[rank] > 0}
    worst = max(beyond, key=lambda m: beyond[m])
    return Slowest(rank, worst, float(total[rank]), float(np.median(total[total > 0])))


def listed(waited_s: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """By module, seconds for which each rank waited; nothing of jobs with more than MOST_RANKS ranks."""
    return {m: s.tolist() for m, s in waited_s.items() if len(s) <= MOST_RANKS}
