"""Choices drawn in place of a router's, and integers that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.virtual.recorder import Recorder
from mm.virtual.run import fake_mode
from mm.virtual.values import Values, drawn_choices, value_of


@given(st.integers(0, 200), st.integers(1, 40), st.data(), st.floats(1.0, 50.0))
@settings(max_examples=80, deadline=None)
def test_every_token_has_distinct_experts(
    tokens: int, experts: int, data: st.DataObject, skew: float
) -> None:
    choices = data.draw(st.integers(1, experts))
    drawn = drawn_choices(tokens, choices, experts, skew)
    assert drawn.shape == (tokens, choices)
    assert all(len(set(row)) == choices for row in drawn.tolist())
    assert drawn.size == 0 or 0 <= drawn.min() <= drawn.max() < experts


@pytest.mark.parametrize("skew", [1.0, 1.5, 3.0, 8.0])
def test_the_fullest_expert_has_the_skew(skew: float) -> None:
    rows = np.bincount(drawn_choices(4096, 6, 128, skew).ravel(), minlength=128)
    assert rows.max() / rows.mean() == pytest.approx(skew, rel=0.01)


def test_integers_follow_and_floats_do_not() -> None:
    fake = fake_mode()
    device = torch.device("cpu")
    recorder = Recorder(device, 0, values=Values(fake, 1.0), names=lambda g: "")
    with fake, recorder:
        score = torch.rand(12, 8)
        chosen = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :2]
        flat = chosen.reshape(-1)
        counts = flat.new_zeros(8).scatter_add_(0, flat, torch.ones_like(flat))
        assert counts.tolist() == [3] * 8
        back = torch.empty_like(flat)
        back[torch.argsort(flat, stable=True)] = torch.arange(24)
        assert sorted(back.tolist()) == list(range(24))
        assert (counts > 2).nonzero().shape == (8, 1)
        assert value_of(score) is None
        for read in (float, bool, Tensor.item):  # a branch by what nobody knows would be a guess
            with pytest.raises(RuntimeError, match=r"test_values.py:\d+ reads a value"):
                read(score.sum())
        counts += score.to(torch.int64)[0]  # what depends on scores has no value any more
        with pytest.raises(RuntimeError, match="nothing stands in for it"):
            counts.tolist()
