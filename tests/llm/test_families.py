"""Families of published models: logits and gradients of transformers, the same bytes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm.hf import CausalLM, load_hf
from llm.hf.weights import checkpoint_tensors
from parallel.published import join
from tests.llm.families import RANDOM, ids_of, loss, run, save, tiny


def far(ours: Tensor, theirs: Tensor, least: float = 1e-30) -> float:
    """Largest difference, relative to the largest element, or to `least`."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=least))


def theirs_by_key(model: Any, folder: Path) -> dict[str, Tensor]:
    """Gradients of transformers' model under published names: saved as weights are, by its own code."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    return load_file(save(model, folder) / "model.safetensors")


def ours_by_key(model: CausalLM) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.model.named_parameters()}
    out = {}
    for t in checkpoint_tensors(model.model.cfg):
        if all(p.name in grads for p in t.parts):
            out[t.key] = join(t, {p.name: grads[p.name] for p in t.parts})  # type: ignore[misc]
    return out


def hold_equal(theirs: Any, folder: Path, tolerance: float) -> None:
    """The logits of both on one batch, and the gradients of all parameters."""
    ours = load_hf(save(theirs, folder / "in"))
    ids = ids_of(theirs.config.vocab_size)
    expected, given = run(theirs, ids), ours(ids)
    assert given.dtype == expected.dtype
    assert far(given, expected) < tolerance
    loss(expected, ids).backward()
    loss(given, ids).backward()
    known, mine = theirs_by_key(theirs, folder / "grads"), ours_by_key(ours)
    known = {key: g for key, g in known.items() if "e_score_correction_bias" not in key}
    assert mine.keys() == known.keys()
    # One expert a token, its weight divided by itself: the router's gradient is zero, and noise in both.
    least = 1e-6 * max(float(g.abs().max()) for g in known.values())
    errors = {key: far(mine[key], g, least) for key, g in known.items()}
    assert not {key: e for key, e in errors.items() if not e < tolerance}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("seed", range(4))
def test_any_model_of_a_family(tmp_path: Path, name: str, seed: int) -> None:
    hold_equal(tiny(name, seed=seed), tmp_path, 1e-10)
