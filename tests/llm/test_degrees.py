"""The first law for every kind of layer under every degree and pairs of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm.config import LLMConfig
from tests.llm.degrees import Degrees, check, run

CFG = LLMConfig(
    d_model=8,
    vocab_size=24,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
    attention_bias=True,
    mamba_heads=4,
    mamba_head_dim=3,
    mamba_state=5,
    mamba_groups=2,
    chunk=4,
    n_experts=4,
    top_k=2,
    expert_ffn=8,
    shared_ffn=8,
    mlp_ffn=12,
    init_std=0.2,
)
LANES = [(11, 1, 18), (30,), (), (2, 0, 17, 3)]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_attention(order: Any, ranks: Any) -> None:
    degrees = Degrees(4, cp=2, tp=2, sp=True, order=order)
    results = ranks(4, run, CFG, "*", degrees, LANES[:1])
    check(CFG, "*", degrees, LANES[:1], [r[0] for r in results])
    kv1 = replace(CFG, n_kv_heads=1)
    results = ranks(4, run, kv1, "*", degrees, LANES[:1])
    check(kv1, "*", degrees, LANES[:1], [r[0] for r in results])
