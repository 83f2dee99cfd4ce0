"""The slowest rank of a step."""

from __future__ import annotations

import numpy as np

from mm.train.stragglers import MOST_RANKS, Slowest, listed, slowest


def test_the_slowest_rank_is_named_with_what_it_lost_most_in() -> None:
    # Rank 2 is late in vision, though the language model takes longer on all ranks.
    own = {"vision": np.array([1.0, 1.0, 3.0, 0.0]), "llm": np.array([9.0, 9.0, 9.5, 9.0])}
    assert slowest(own) == Slowest(2, "vision", 12.5, 10.0)
    assert slowest({"vision": np.array([0.0, 2.0])}) == Slowest(1, "vision", 2.0, 2.0)
    assert slowest({"vision": np.zeros(4)}) is None


def test_waiting_is_listed_by_rank_in_small_jobs() -> None:
    assert listed({"llm": np.array([0.5, 0.0])}) == {"llm": [0.5, 0.0]}
    assert listed({"llm": np.zeros(MOST_RANKS + 1)}) == {}
