"""The examples do what they say, in several layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.join_two_modules import train

ALONE = ({"ranks": [0]}, {"ranks": [0]})
LAYOUTS = {
    "colocated, dp4 and dp4": (4, {}, {}),
    "colocated, dp4 and dp2 with each stream on two": (4, {}, {"tp": 2, "sequence_parallel": True}),
    "disjoint, dp3 and one": (4, {"ranks": "0-2"}, {"ranks": "3"}),
    "disjoint, dp2 and one stream on two": (
        4,
        {"ranks": "0-1"},
        {"ranks": "2-3", "tp": 2, "sequence_parallel": True},
    ),
    "overlapping, with a rank that has neither": (4, {"ranks": "0-1"}, {"ranks": "1-2"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_modules_learn_the_same_in_any_layout(ranks: Any, name: str) -> None:
    n, encoder, decoder = LAYOUTS[name]
    ((losses, gradients),) = ranks(1, train, *ALONE)
    seen = set()
    for found, mine in ranks(n, train, encoder, decoder):
        assert found == pytest.approx(losses, rel=1e-12, abs=0)
        for key, grad in mine.items():
            torch.testing.assert_close(grad, gradients[key], rtol=1e-9, atol=1e-12)
        seen |= set(mine)
    assert seen == set(gradients) and losses[0] != losses[-1]
