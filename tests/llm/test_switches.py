"""Switches of other families against a straight-line program, one at a time and in random combinations."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
import torch

from llm.checks import check
from llm.config import LLMConfig
from llm.flops import param_count
from llm.model import LLM, LLMBatch
from llm.rotary import RopeScaling, attention_factor, speeds
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared, initialise
from tests.llm.degrees import close, vary
from tests.llm.harness import tiny, weigh
from tests.llm.straight import losses

BASE: dict[str, Any] = {
    "pattern": "*-*E*",
    "d_model": 12,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 100.0,
    "n_experts": 4,
    "top_k": 2,
    "expert_ffn": 6,
    "router": "softmax",
    "mlp_gated": True,
    "activation": "silu",
    "mlp_ffn": 8,
}
SCALINGS = {
    "linear": RopeScaling("linear", 3.0),
    "llama3": RopeScaling("llama3", 4.0, original=40),
    "yarn": RopeScaling("yarn", 4.0, original=40, beta_fast=4.0),
    "yarn untruncated": RopeScaling("yarn", 4.0, original=40, beta_fast=4.0, truncate=False),
    "yarn factor": RopeScaling("yarn", 4.0, original=40, attention_factor=0.7),
    "longrope": RopeScaling("longrope", 2.0, 9, short=(1.0, 1.1, 1.3, 2.0), long=(1.5, 2.0, 3.0, 5.0)),
}
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm head": {"qk_norm": "head"},
    "qk_norm full": {"qk_norm": "full", "norm_shift": True},
    **{f"rope {name}": {"rope_scaling": scaling} for name, scaling in SCALINGS.items()},
    "rope_share": {"rope_share": 0.5},
    "rope_skips": {"rope_skips": (0, 4)},
    "norms after": {"norms": "after"},
    "norms both, shifted": {"norms": "both", "norm_shift": True, "activation": "gelu_tanh"},
    "scales": {"embed_scale": 3.0, "branch_scale": 0.4, "logit_scale": 0.6, "attention_scale": 0.2},
    "logit_cap": {"logit_cap": 0.5, "logit_scale": 2.0, "tied": True},
}
SWITCHES |= {
    "window": {"window": 4, "n_kv_heads": 1},
    "window of one": {"window": 1, "window_layers": (2,)},
    "window with positions of its own": {
        **{"window": 3, "window_layers": (0, 4), "window_rope_theta": 30.0},
        "rope_scaling": SCALINGS["yarn"],
    },
    "attention_cap": {"attention_cap": 0.3, "attention_scale": 0.9},
    "attention_sinks": {"attention_sinks": True, "window": 5, "window_layers": (0, 4)},
    "clamped gates, biases of experts": {"activation": "clamped", "moe_bias": True, "init_std": 2.0},
    "window and caps": {"window": 5, "window_layers": (2, 4), "attention_cap": 0.4, "logit_cap": 0.5},
}
LATENTS = {"kv_rank": 5, "q_rank": 6, "rope_head_dim": 4, "v_head_dim": 6, "head_dim": 7, "n_kv_heads": 4}
SWITCHES |= {
    "rope_interleaved": {"rope_interleaved": True, "rope_share": 0.5},
    "latents": {**LATENTS, "rope_interleaved": True},
    "latents, wide values": {**LATENTS, "v_head_dim": 11, "q_rank": None, "attention_bias": True},
    "latents, bounded": {**LATENTS, "window": 4, "attention_cap": 0.4, "rope_skips": (2,)},
}
LENGTHS = (9, 1, 17, 3)


def compare(cfg: LLMConfig, lengths: tuple[int, ...], seed: int) -> None:
    """Losses and gradients of ours and of the straight-line program, to 1e-9."""
    check(cfg)
    gen = torch.Generator().manual_seed(seed)
    model = LLM(cfg, dtype=torch.float64)
    assert param_count(cfg)[0] == sum(p.numel() for p in model.parameters())
    initialise(model, seed, "llm")
    vary(model)
    for i, moe in enumerate(model.moe_layers()):
        moe.expert_bias.copy_(0.2 * torch.cos(torch.arange(cfg.n_experts) * (i + 1.0)))
    total = sum(lengths)
    ids, labels = torch.randint(0, cfg.vocab_size, (2, total), generator=gen)
    labels[torch.rand(total, generator=gen) < 0.3] = -100
    loss = model(LLMBatch(ids, labels, Packing.of(lengths), total, {}), {})
    weigh(loss).backward()
    w = {name: p.detach().clone().requires_grad_() for name, p, _ in declared(model)}
    w |= {name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}
    expected = losses(cfg, w, ids, labels, lengths)
    weigh(expected).backward()
    close(loss.detach(), expected.detach(), "loss")
    for name, p, _ in declared(model):
        close(p.grad, w[name].grad, name)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_is_the_straight_line_program(switch: str) -> None:
    compare(tiny(**{**BASE, **SWITCHES[switch]}), LENGTHS, 3)


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_speeds_are_those_of_transformers(kind: str) -> None:
    import tests.llm.oracle  # noqa: F401  makes transformers importable

    from transformers import LlamaConfig  # isort: skip
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # isort: skip

    scaling = SCALINGS[kind]
    names = {
        "kind": "rope_type",
        "original": "original_max_position_embeddings",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
        "short": "short_factor",
        "long": "long_factor",
    }
    given = {names.get(k, k): v for k, v in asdict(scaling).items()}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=80)
    config.rope_parameters = {**given, "rope_theta": 100.0, "attention_factor": scaling.attention_factor}
    found = speeds(100.0, 4, scaling)
    for row, seq_len in enumerate([1, 80][: len(found)]):
        theirs, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"), seq_len=seq_len)
        torch.testing.assert_close(torch.from_numpy(found[row]).float(), theirs, rtol=1e-6, atol=0)
        assert factor == pytest.approx(attention_factor(scaling))


@pytest.mark.parametrize("seed", range(8))
def test_random_combinations_are_the_straight_line_program(seed: int) -> None:
    rng = random.Random(seed)
    given: dict[str, Any] = {**BASE, "pattern": "".join(rng.choice("*-E") for _ in range(3)) + "*"}
    layers = [i for i, symbol in enumerate(given["pattern"]) if symbol == "*"]
    window = rng.choice([None, 1, 4, 12])
    given |= {
        "n_kv_heads": rng.choice([1, 2, 4]),
        "tied": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "attention_bias": (biased := rng.random() < 0.3),
        "qkv_bias": not biased and rng.random() < 0.5,
        "qk_norm": rng.choice(["none", "head", "full"]),
        "rope_scaling": rng.choice([None, *(s for name, s in SCALINGS.items() if name != "longrope")]),
        "rope_share": rng.choice([1.0, 0.5]),
        "rope_skips": tuple(i for i in layers if rng.random() < 0.3),
        "window": window,
        "window_layers": rng.choice([None, (layers[-1],)]) if window else None,
        "window_rope_theta": rng.choice([None, 20.0]) if window else None,
        "attention_scale": rng.choice([None, 0.3]),
        "attention_cap": rng.choice([None, 0.5]),
        "attention_sinks": rng.random() < 0.3,
        "norms": rng.choice(["before", "after", "both"]),
        "norm_shift": rng.random() < 0.5,
        "embed_scale": rng.choice([1.0, 2.0]),
        "branch_scale": rng.choice([1.0, 0.4]),
        "logit_scale": rng.choice([1.0, 0.7]),
        "logit_cap": rng.choice([None, 1.5]),
        "activation": rng.choice(["relu2", "gelu", "gelu_tanh", "silu", "clamped"]),
        "moe_bias": "E" in given["pattern"] and rng.random() < 0.5,
    }
    given["rope_interleaved"] = rng.random() < 0.3
    if seed > 5:
        given |= {
            **{"kv_rank": rng.choice([1, 4, 9]), "q_rank": rng.choice([None, 3]), "head_dim": 9},
            **{"rope_head_dim": rng.choice([2, 4, 6]), "v_head_dim": rng.choice([None, 5, 12])},
            **{"n_kv_heads": 4, "qkv_bias": False, "qk_norm": "none", "attention_sinks": False},
            "rope_share": 1.0,
        }
    lengths = tuple(rng.choice([1, 2, 5, 9, 20, 90]) for _ in range(rng.randint(1, 4)))
    compare(tiny(**given), lengths, seed)
