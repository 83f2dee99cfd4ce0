"""Adapters are W + alpha / rank * B A: outputs and gradients are those of the merged weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm.config import LLMConfig
from llm.decode import Prompt, generate
from llm.model import LLM, LLMBatch
from parallel.sequence.packed import Packing
from parallel.sharding.low_rank import (
    ALL,
    LowRank,
    adapters_of,
    add_adapters,
    is_adapter,
    linear_maps,
    matching,
)
from parallel.sharding.param import initialise

CFG = LLMConfig(
    **{"vocab_size": 32, "pattern": "ME*-", "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4},
    **{"mamba_heads": 4, "mamba_head_dim": 4, "mamba_state": 4, "mamba_groups": 2, "chunk": 4},
    **{"n_experts": 4, "top_k": 2, "expert_ffn": 8, "shared_ffn": 8, "mlp_ffn": 24, "loss_chunk": 8},
    init_std=0.3,
)
LATENTS = {
    **{"pattern": "*-*", "kv_rank": 5, "q_rank": 6, "head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7},
    **{"n_kv_heads": 4, "rope_theta": 1e4},
}
LATENT, NARROW = replace(CFG, **LATENTS), replace(CFG, **{**LATENTS, "q_rank": None})
CASES = st.sampled_from(
    [(CFG, t) for t in ([ALL], ["q", "v"], ["out"], ["layers.0.*", "k"])]
    + [(LATENT, [ALL]), (LATENT, ["q_down", "kv_up"]), (NARROW, [ALL]), (NARROW, ["q", "kv_down"])]
)


def loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(12) * 7 % 32
    batch = LLMBatch(ids, ids.roll(-1), Packing.of([5, 7]), 12, {})
    out: torch.Tensor = model(batch, {}).sum()
    return out


@torch.no_grad()
def merge(model: nn.Module, plain: nn.Module, scale: float) -> None:
    """Adapters of `model` at random values, and their changes in the weights of `plain`."""
    own = dict(model.named_parameters())
    for name, param in own.items():
        if is_adapter(name):
            param.copy_(torch.randn_like(param) * 0.1)
    for name, param in plain.named_parameters():
        a, b = adapters_of(name)
        if a in own:
            param += scale * own[b] @ own[a]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.floats(0.5, 32), CASES)
def test_it_learns_what_the_merged_weights_would(
    rank: int, alpha: float, case: tuple[LLMConfig, list[str]]
) -> None:
    cfg, targets = case
    model, plain = (LLM(cfg, dtype=torch.float64) for _ in range(2))
    add_adapters(model, LowRank(rank, alpha, targets))
    for net in (model, plain):
        initialise(net, 0, "llm")
    assert torch.equal(loss(model), loss(plain)), "B starts at zero"
    own, scale = dict(model.named_parameters()), alpha / rank
    merge(model, plain, scale)
    ours, theirs = loss(model), loss(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    touched = 0
    for name, param in plain.named_parameters():
        assert own[name].grad is None and not own[name].requires_grad
        a, b = adapters_of(name)
        if a in own:
            assert param.grad is not None
            touched += 1
            by_hand = {a: scale * own[b].T @ param.grad, b: scale * param.grad @ own[a].T}
            for adapter, grad in by_hand.items():
                torch.testing.assert_close(own[adapter].grad, grad, rtol=1e-9, atol=1e-13)
    assert touched == len({n for some in matching([*linear_maps(model)], targets).values() for n in some}) > 0


@pytest.mark.parametrize("cfg", [CFG, LATENT])
def test_it_answers_as_the_merged_weights(cfg: LLMConfig) -> None:
    """A token at a time too, where latents are read by another route than in training."""
    model, plain = (LLM(cfg, dtype=torch.float64) for _ in range(2))
    add_adapters(model, LowRank(3, 6.0, [ALL]))
    for net in (model, plain):
        initialise(net, 0, "llm")
    prompt = Prompt(torch.arange(9) * 7 % 32)
    before = generate(plain.eval(), [prompt], 12)
    merge(model, plain, 2.0)
    answers = [generate(net.eval(), [prompt], 12) for net in (model, plain)]
    assert answers[0] == answers[1] != before


def test_targets_are_names_ends_of_names_or_patterns() -> None:
    names = ["layers.0.mixer.q", "layers.1.mixer.q", "layers.1.mixer.out", "q"]
    assert matching(names, ["q", "layers.1.*", "mixer.out", "x"]) == {
        "q": ["layers.0.mixer.q", "layers.1.mixer.q", "q"],
        "layers.1.*": ["layers.1.mixer.q", "layers.1.mixer.out"],
        "mixer.out": ["layers.1.mixer.out"],
        "x": [],
    }
    assert matching(names, [ALL]) == {ALL: names}


@pytest.mark.parametrize("targets", [["experts"], ["router"], ["embed"]])
def test_experts_routers_and_embeddings_are_no_targets(targets: list[str]) -> None:
    assert matching([*linear_maps(LLM(CFG, device="meta"))], targets) == {targets[0]: []}
