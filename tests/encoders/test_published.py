"""Encoders of published families equal transformers' classes: last hidden state and all gradients."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from encoders.hf import load_hf
from tests.encoders import published
from tests.encoders.published_checks import close, hold_exact


@pytest.mark.parametrize("name", published.NAMES)
def test_states_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """To 1e-10 in float64 and 1e-5 in float32."""
    hold_exact(name, tmp_path / "64", torch.float64, 1e-10)
    hold_exact(name, tmp_path / "32", torch.float32, 1e-5)


@settings(deadline=None, max_examples=25)
@drawn(name=st.sampled_from(published.NAMES), seed=st.integers(0, 10**6))
def test_random_configs_of_each_family(name: str, seed: int) -> None:
    """Odd heads, biases there or not, gated or not, any patch: states in float64."""
    options = published.random_options(name, seed)
    model = published.oracle(name, seed=seed, **options)
    with tempfile.TemporaryDirectory() as folder:
        net = load_hf(published.saved(model, Path(folder)))
    for given in published.inputs(name, model):
        expected = published.real(name, given, published.run(name, model, given))
        close(published.real(name, given, net.features(given)), expected, 1e-10, str(options))
