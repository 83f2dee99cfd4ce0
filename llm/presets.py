"""Published models by name, with their exact shapes, and a tiny one of each kind. Pure.

Sources: Nemotron-H (arXiv 2504.03624), Nemotron Nano 2 (2508.14444), Nemotron 3 (2512.20856) with its Nano
(2512.20848), Super (2604.12374) and Ultra (2606.15007), Llama 3 (2407.21783), Mixtral (2401.04088),
gpt-oss (2508.10925), DeepSeek-V3 (2412.19437), and the models' published configurations; gpt-7b to gpt-70b
are dense models of GPT's form (arXiv 2005.14165) that layouts are compared with (docs/planning_published.md).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from typing import Any

from llm.config import LLMConfig
from llm.rotary import RopeScaling

# Each model names the fields in which it differs from the one that it is made of: alike in form, not in fact.
_NEMOTRON_H_8B = LLMConfig(
    pattern="M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-",
    d_model=4096,
    vocab_size=131072,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    mamba_heads=128,
    mamba_head_dim=64,
    mamba_state=128,
    mamba_groups=8,
    chunk=128,
    mlp_ffn=21504,
)

_NANO_3 = replace(
    _NEMOTRON_H_8B,
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    d_model=2688,
    n_kv_heads=2,
    mamba_heads=64,
    n_experts=128,
    top_k=6,
    expert_ffn=1856,
    shared_ffn=3712,
    routed_scale=2.5,
    aux_weight=1e-4,
    init_std=0.0173,
)

_SUPER_3 = replace(
    _NANO_3,
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    d_model=4096,
    mamba_heads=128,
    n_experts=512,
    top_k=22,
    expert_ffn=2688,
    shared_ffn=5376,
    latent=1024,
    routed_scale=5.0,
    mtp_layers=2,
    init_std=0.014,
)

_LLAMA_3_8B = LLMConfig(
    pattern=32 * "*-",
    d_model=4096,
    vocab_size=128256,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    mlp_ffn=14336,
    mlp_gated=True,
    activation="silu",
)

_GPT_OSS_120B = LLMConfig(
    pattern=36 * "*E",
    d_model=2880,
    vocab_size=201088,
    n_heads=64,
    n_kv_heads=8,
    head_dim=64,
    attention_bias=True,
    attention_sinks=True,
    rope_theta=150000.0,
    rope_scaling=RopeScaling("yarn", 32.0, 4096, truncate=False),
    window=128,
    window_layers=tuple(range(0, 72, 4)),
    n_experts=128,
    top_k=4,
    expert_ffn=2880,
    shared_ffn=0,
    moe_bias=True,
    router="softmax",
    routed_scale=1.0,
    expert_bias_rate=0.0,
    mlp_gated=True,
    activation="clamped",
)

_DEEPSEEK_V3 = LLMConfig(
    pattern=3 * "*-" + 58 * "*E",
    d_model=7168,
    vocab_size=129280,
    n_heads=128,
    n_kv_heads=128,
    head_dim=192,
    kv_rank=512,
    q_rank=1536,
    rope_head_dim=64,
    v_head_dim=128,
    rope_theta=10000.0,
    rope_interleaved=True,
    # Both factors of its yarn are 1: none on cosines and sines, this one on scores.
    rope_scaling=RopeScaling("yarn", 40.0, 4096, attention_factor=1.0),
    attention_scale=192**-0.5 * (0.1 * math.log(40.0) + 1.0) ** 2,
    n_experts=256,
    top_k=8,
    expert_ffn=2048,
    shared_ffn=2048,
    routed_scale=2.5,
    expert_groups=8,
    top_groups=4,
    aux_weight=1e-4,
    mlp_ffn=18432,
    mlp_gated=True,
    activation="silu",
    norm_eps=1e-6,
)

_TINY = LLMConfig(
    pattern="M-M*-M-",
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    mamba_heads=8,
    mamba_groups=2,
    chunk=32,
    mlp_ffn=192,
)


def _gpt(blocks: int, width: int) -> LLMConfig:
    """A dense model of GPT's form: heads of 128 that share no keys, and an MLP of four widths."""
    return LLMConfig(
        pattern=blocks * "*-",
        d_model=width,
        vocab_size=128000,
        n_heads=width // 128,
        n_kv_heads=width // 128,
        head_dim=128,
        mlp_ffn=4 * width,
        activation="gelu",
    )


PRESETS = {
    "nemotron-h-8b": _NEMOTRON_H_8B,
    "nemotron-h-56b": replace(
        _NEMOTRON_H_8B,
        pattern="M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-",
        d_model=8192,
        n_heads=64,
        mamba_heads=256,
        mamba_state=256,
        mlp_ffn=32768,
        init_std=0.0099,
    ),
    "nemotron-nano-9b-v2": replace(
        _NEMOTRON_H_8B,
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        d_model=4480,
        n_heads=40,
        mamba_head_dim=80,
        mlp_ffn=15680,
    ),
    "nemotron-3-nano-30b-a3b": _NANO_3,
    "nemotron-3-super-120b-a12b": _SUPER_3,
    "nemotron-3-ultra-550b-a55b": replace(
        _SUPER_3,
        pattern=(
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
            "EMEMEMEM*EMEMEMEME"
        ),
        d_model=8192,
        n_heads=64,
        mamba_heads=256,
        expert_ffn=5120,
        shared_ffn=10240,
        latent=2048,
        init_std=0.0099,
    ),
    "llama-3-8b": _LLAMA_3_8B,
    "mixtral-8x7b": replace(
        _LLAMA_3_8B,
        pattern=32 * "*E",
        vocab_size=32000,
        rope_theta=1e6,
        n_experts=8,
        top_k=2,
        expert_ffn=14336,
        shared_ffn=0,
        router="softmax",
        routed_scale=1.0,
        expert_bias_rate=0.0,
        aux_weight=0.02,
    ),
    "gpt-oss-20b": replace(
        _GPT_OSS_120B, pattern=24 * "*E", window_layers=tuple(range(0, 48, 4)), n_experts=32
    ),
    "gpt-oss-120b": _GPT_OSS_120B,
    "deepseek-v3": _DEEPSEEK_V3,
    "gpt-7b": _gpt(32, 4096),
    "gpt-14b": _gpt(48, 5120),
    "gpt-32b": _gpt(64, 6144),
    "gpt-70b": _gpt(80, 8192),
    "tiny-hybrid": _TINY,
    "tiny-moe": replace(_TINY, pattern="MEM*EME"),
    "tiny-latent": replace(_TINY, pattern="MEM*EME", latent=32, n_experts=16, top_k=4, mtp_layers=2),
    "tiny-transformer": replace(
        _TINY, pattern="*-*-", rope_theta=10000.0, mlp_gated=True, activation="silu", tied=True
    ),
}


def preset(name: str, **changes: Any) -> LLMConfig:
    """The model `name`, with some fields changed. Raises ValueError for an unknown name, with the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"model.llm.preset is {name!r}; {hint}")
    return replace(PRESETS[name], **changes)
