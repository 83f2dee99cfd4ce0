"""Upcycling: the mixture starts as the function that the dense model was."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.hf import load_hf, save_hf
from llm.hf.export import write_model
from llm.model import LLM, LLMBatch
from llm.upcycle import upcycle, upcycled, upcycled_config
from parallel.published import module_tensors
from parallel.sharding.param import initialise
from tests.llm.harness import TINY, Text, make_batch, tiny


def dense_model(seed: int, **change: Any) -> LLM:
    cfg = tiny(**{"pattern": "M-*-", "mlp_ffn": 24, **change})
    model = LLM(cfg, dtype=torch.float64)
    initialise(model, seed, "llm")
    return model


def make_text(lengths: tuple[int, ...], seed: int) -> LLMBatch:
    """Documents of random tokens without rows of encoders."""
    return replace(make_batch(Text(lengths, 0, seed), TINY.vocab_size)[0], row_positions={})


@pytest.mark.parametrize("seed", range(10))
def test_the_function_is_preserved(seed: int) -> None:
    r = random.Random(seed)
    dense = dense_model(seed, activation=r.choice(["relu2", "silu", "gelu"]), mlp_gated=r.random() < 0.5)
    shards, groups = r.choice([1, 2, 3, 4]), r.choice([1, 2, 3])
    cfg = upcycled_config(
        dense.cfg,
        granularity=shards,
        n_experts=shards * r.randint(groups, 5),
        top_k=shards * groups,
        shared_ffn=r.choice([0, 8]),
        routed_scale=r.choice([1.0, 2.5]),
        layers=r.choice([None, [3]]),
    )
    mixture = upcycle(dense, cfg, seed=seed)
    assert mixture.cfg.symbols == ("ME*E" if mixture.cfg.symbols.count("E") == 2 else "M-*E")
    batch = make_text((13, 9), seed)
    before, after = dense(batch, {}), mixture(batch, {})
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    # Whole groups are chosen: the experts of a group get the same tokens, and only some groups get any one.
    for moe in mixture.moe_layers():
        load = moe.load.view(-1, shards)
        assert (load == load[:, :1]).all()
        assert load.sum() == 22 * cfg.top_k


def test_upcycled_checkpoints_parameter_by_parameter(tmp_path: Path) -> None:
    """From a published dense model to a published mixture, without a whole model in memory."""
    save_hf(dense_model(5), tmp_path / "dense")
    dense = load_hf(tmp_path / "dense").model
    cfg = upcycled_config(dense.cfg, granularity=2, n_experts=8, top_k=4, shared_ffn=8, routed_scale=2.5)
    given = module_tensors(dense)
    value = upcycled(given.__getitem__, dense.cfg, cfg, seed=1)
    write_model(cfg, lambda names: {n: value(n) for n in names}, tmp_path / "mixture", torch.float64, 4096)
    ids = torch.arange(20).view(2, 10)
    before, after = load_hf(tmp_path / "dense")(ids), load_hf(tmp_path / "mixture")(ids)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


def test_copies_come_to_differ() -> None:
    """Experts of different groups start equal, but learn from other tokens."""
    dense = dense_model(1)
    mixture = upcycle(dense, upcycled_config(dense.cfg, granularity=2, n_experts=6, top_k=2), seed=1)
    batch = make_text((30,), 1)
    mixture(batch, {}).sum().backward()
    for moe in mixture.moe_layers():
        up = moe.experts.up.unflatten(0, (3, 2))
        assert torch.equal(up[0], up[1])
        assert (
            moe.experts.up.grad.unflatten(0, (3, 2))[0] != moe.experts.up.grad.unflatten(0, (3, 2))[1]
        ).any()


@pytest.mark.parametrize(
    ("dense", "change", "words"),
    [
        ({"pattern": "M*"}, {}, "no dense MLP to upcycle"),
        ({"pattern": "ME-"}, {}, "has experts already"),
        ({"mlp_bias": True}, {}, "experts have no biases"),
        ({}, {"granularity": 5}, r"mlp_ffn=24 does not divide by granularity=5; nearest: granularity=4"),
        ({}, {"top_k": 3}, "top_k=3 does not divide by granularity=2"),
        ({}, {"layers": [0]}, "layer 0 of 'M-[*]-' is no dense MLP"),
        ({}, {"top_k": 8}, "top_k=8 of n_experts=6"),
    ],
)
def test_what_does_not_fit_is_refused(dense: dict[str, Any], change: dict[str, Any], words: str) -> None:
    cfg = tiny(**{"pattern": "M-*-", "mlp_ffn": 24, **dense})
    wanted: dict[str, Any] = {"granularity": 2, "n_experts": 6, "top_k": 2, **change}
    with pytest.raises(ValueError, match=words):
        upcycled_config(cfg, **wanted)
