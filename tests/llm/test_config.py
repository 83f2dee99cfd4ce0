"""Refusals, parameter counts against published models, and operations counted against torch's counter."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm.checks import check
from llm.flops import flops, layer_flops, layer_params, pairs, param_count, weightless_cost
from llm.model import LLM, loss_rows
from llm.mtp import ahead
from llm.rotary import RopeScaling
from tests.llm.harness import TINY, Text, make_batch, tiny


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", TINY.pattern])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent": 6, "mtp_layers": 2, "tied": True},
        {"mlp_gated": True, "mlp_bias": True, "shared_ffn": 0},
        {"qkv_bias": True, "qk_norm": "head", "norms": "after", "mlp_gated": True},
        {
            "attention_sinks": True,
            "qk_norm": "full",
            "attention_bias": True,
            "norms": "both",
            "mtp_layers": 1,
        },
    ],
    ids=str,
)
def test_count_is_what_the_model_has(pattern: str, changes: dict[str, Any]) -> None:
    cfg = tiny(pattern=pattern, **changes)
    model = LLM(cfg, device="meta")
    assert param_count(cfg)[0] == sum(p.numel() for p in model.parameters())
    assert layer_params(cfg, pattern[0])[0] == sum(p.numel() for p in model.layers[0].parameters())


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [(p, {}) for p in ("M", "*", "E", "-", TINY.pattern)]
    + [("E", {"latent": 16, "shared_ffn": 0}), ("-E", {"mlp_gated": True}), ("*", {"tied": True})]
    + [("-", {"mtp_layers": 2})],
)
def test_flops_are_those_of_the_products(pattern: str, changes: dict[str, Any]) -> None:
    wide = {"d_model": 64, "head_dim": 32, "mamba_head_dim": 32, "mamba_state": 16, "expert_ffn": 48}
    cfg = tiny(pattern=pattern, **{**wide, **changes})
    batch, _ = make_batch(Text((128,), 0, seed=0), cfg.vocab_size)
    model = LLM(cfg, dtype=torch.float64)
    rows = torch.zeros(0, cfg.d_model, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    mtp_labels = ahead(batch.ids, batch.labels, batch.packing, cfg.mtp_layers)[1] if cfg.mtp_layers else None
    ctx = replace(batch, loss_rows=loss_rows(batch.labels, mtp_labels))
    counted = []
    for b in (batch, ctx):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(b, {"vision": rows})
        counted.append(counter.get_total_flops())
    # This attention computes both halves of the causal square; the counter does not know convolutions by tap.
    squares = pattern.count("*") + cfg.mtp_layers * cfg.mtp_pattern.count("*")
    above = 2.0 * 128 * 128 * cfg.n_heads * cfg.head_dim * squares
    channels = cfg.mamba_inner + 2 * cfg.mamba_groups * cfg.mamba_state
    taps = 2.0 * 128 * channels * cfg.conv_kernel * pattern.count("M")
    supervised = int((batch.labels >= 0).sum())
    assert supervised < 100
    for count, found in zip((None, supervised), counted, strict=True):
        assert flops(cfg, [128], count) + above - taps == pytest.approx(found, rel=0.02)
    assert flops(cfg, [64, 64]) <= flops(cfg, [128])


@pytest.mark.parametrize("pattern", ["M", "*", "M*-"])
def test_a_backward_through_frozen_weights_costs_the_forward_and_once_more_what_has_no_weight(
    pattern: str,
) -> None:
    wide = {"d_model": 64, "head_dim": 32, "mamba_head_dim": 32, "mamba_state": 16}
    cfg = tiny(pattern=pattern, **wide)
    batch, _ = make_batch(Text((128,), 0, seed=0), cfg.vocab_size)
    ctx = replace(batch, loss_rows=loss_rows(batch.labels, None))
    model = LLM(cfg, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    assert model.embed is not None
    model.embed.requires_grad_(True)  # looked up, not multiplied: as if what comes from below were learned
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(ctx, {"vision": torch.zeros(0, cfg.d_model, dtype=torch.float64)})
        forward = counter.get_total_flops()
        losses.sum().backward()
    again = counter.get_total_flops() - forward
    # As above, this attention computes both halves of the causal square.
    above = 2.0 * 128 * 128 * cfg.n_heads * cfg.head_dim * pattern.count("*")
    own = float(weightless_cost(cfg).of(np.array([128]), np.array([0]))[0]) + above
    assert own > 0
    assert again == pytest.approx(forward + own, rel=0.03)


@pytest.mark.parametrize("window", [None, 1, 7, 30])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    n = 30
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = (back >= 0) & (back < (window or n))
    # The diagonal counts half, as in n * n / 2.
    assert pairs(n, window) == int(seen.sum()) - min(n, window or n) / 2
    windowed = layer_flops(tiny(), "*", [n, n], window)
    assert windowed == layer_flops(tiny(), "*", [n, n]) - 2 * 4 * 8 * 4 * (pairs(n, None) - pairs(n, window))


@pytest.mark.parametrize(
    ("change", "degrees", "words"),
    [
        ({"pattern": "M*X"}, {}, "'X' at layer 2"),
        ({"pattern": "M|*|X"}, {}, "'X' at layer 2 of 'M|*|X'"),
        ({"pattern": "*", "mtp_layers": 1, "mtp_pattern": "*|E"}, {}, "mtp_pattern has '|' at layer 1"),
        ({"pattern": ""}, {}, "is empty"),
        ({"n_kv_heads": 3}, {}, "nearest: n_kv_heads=2 or n_kv_heads=4"),
        ({"mamba_groups": 3}, {}, "nearest: mamba_groups=2 or mamba_groups=4"),
        ({"top_k": 9}, {}, "nearest: top_k=8"),
        ({"d_model": 0}, {}, "d_model is 0; needed: at least 1"),
        ({"latent": 0}, {}, "latent is 0; needed: at least 1"),
        ({"pattern": "M||E"}, {}, "nearest: pattern=M|E"),
        ({"mtp_layers": 1, "mtp_pattern": "*?"}, {}, "mtp_pattern has '?' at layer 1"),
        ({"mtp_layers": -1}, {}, "mtp_layers is -1; needed: at least 0"),
        ({"expert_groups": 3}, {}, "nearest: expert_groups=2 or expert_groups=4"),
        ({"expert_groups": 4, "top_groups": 5}, {}, "nearest: top_groups=4"),
        ({"expert_groups": 8, "top_groups": 2}, {}, "which hold 2; needed: at most 2; nearest: top_k=2"),
        ({"z_weight": -0.1}, {}, "z_weight is -0.1; needed: 0 (off) or more"),
        ({"routed_scale": 0.0}, {}, "routed_scale is 0.0; needed: more than 0"),
        ({"activation": "swish"}, {}, "activation is 'swish'; known: relu2, gelu, gelu_tanh, silu, clamped"),
        ({"router": "sigmoit"}, {}, "did you mean sigmoid?"),
        ({"dispatcher": "allgather"}, {}, "did you mean all_gather?"),
        ({"pad_experts": True}, {}, "nearest: capacity=1.25"),
        ({"level_layers": (5,)}, {}, "level_layers has 5; needed: a layer's index, 0 to 4"),
        ({"rope_theta": 1e4, "head_dim": 5}, {}, "nearest: head_dim=4 or head_dim=6"),
        ({"pattern": "M-", "mtp_layers": 1, "n_experts": 6}, {"ep": 4}, "nearest: ep=3 or ep=6"),
        ({}, {"tp": 3}, "vocab_size is 32, which does not divide by tp=3"),
        ({}, {"tp": 8}, "mlp_ffn is 20, which does not divide by tp=8; nearest: tp=4"),
        ({}, {"etp": 5}, "expert_ffn is 12, which does not divide by etp=5; nearest: etp=4 or etp=6"),
        ({"pattern": "M-"}, {"etp": 2}, "etp=2 needs an E layer in model.llm.pattern"),
        ({"n_experts": 6}, {"ep": 4}, "nearest: ep=3 or ep=6"),
        ({"pattern": "M-"}, {"ep": 2}, "nearest: ep=1"),
        ({"pattern": "M-", "z_weight": 0.1}, {}, "would have no effect; nearest: z_weight=0.0"),
        ({"pattern": "M-", "capacity": 2.0}, {}, "would have no effect; nearest: capacity=null"),
        ({"attention_bias": True, "qkv_bias": True}, {}, "nearest: qkv_bias=False or attention_bias=False"),
        ({"qk_norm": "heads"}, {}, "did you mean head?"),
        ({"norms": "post"}, {}, "norms is 'post'; known: before, after, both"),
        ({"window": 0}, {}, "window is 0; needed: at least 1"),
        ({"window_layers": (2,)}, {}, "window_layers without window would have no effect"),
        ({"window": 4, "window_layers": (2, 3)}, {}, "window_layers has 3; needed: the index of an"),
        ({"rope_theta": 1e4, "rope_skips": (0,)}, {}, "of an attention layer of 'ME*-E': 2"),
        ({"rope_skips": (2,)}, {}, "rope_skips without rope_theta"),
        ({"rope_theta": 1e4, "rope_share": 0.0}, {}, "rope_share is 0.0; needed: more than 0, at most 1"),
        ({"rope_theta": 1e4, "rope_share": 0.3}, {}, "rope_share=0.3 of head_dim=4 is 1 features"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, {}, "rope_scaling without rope_theta"),
        ({"embed_scale": 0.0}, {}, "embed_scale is 0.0; needed: more than 0"),
        ({"logit_cap": -3.0}, {}, "logit_cap is -3.0; needed: more than 0"),
    ],
)
def test_refusals_say_what_works(change: dict[str, object], degrees: dict[str, int], words: str) -> None:
    cfg = tiny(vocab_size=32, **change)
    with pytest.raises(ValueError, match=re.escape(words)):
        check(cfg, **degrees)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "dynamic"}, "kind is 'dynamic'; known: linear, llama3, yarn, longrope"),
        ({"kind": "llama3"}, "kind=llama3 needs original"),
        ({"kind": "linear", "original": 8}, "original=8 is not of kind=linear, which has factor"),
        ({"kind": "llama3", "original": 8, "low": 4.0}, "low=4.0 with high=4.0; needed: low below high"),
        ({"kind": "yarn", "original": 8, "beta_slow": 32.0}, "needed: beta_slow below beta_fast"),
        ({"kind": "yarn", "original": 8, "attention_factor": 0.0}, "attention_factor is 0.0; needed: more"),
        ({"kind": "longrope", "original": 8, "short": (1.0, 1.0), "long": (1.0,)}, "long has 1 factors"),
        ({"kind": "linear", "factor": -2.0}, "factor is -2.0; needed: more than 0"),
    ],
)
def test_refusals_of_rotary_scaling(given: dict[str, Any], words: str) -> None:
    scaling = RopeScaling(**{"factor": 2.0, **given})
    with pytest.raises(ValueError, match=re.escape(words)):
        check(tiny(rope_theta=1e4, rope_scaling=scaling))


def test_what_is_proposed_works() -> None:
    with pytest.raises(ValueError, match=r"nearest: tp=4$"):
        check(tiny(vocab_size=40), tp=5)
    check(tiny(vocab_size=40), tp=4, ep=8)


def test_tp_may_exceed_key_value_heads_and_groups() -> None:
    check(tiny(pattern="M*", vocab_size=32, n_kv_heads=1, mamba_groups=2), tp=8)
