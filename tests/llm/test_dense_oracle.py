"""Models outside the Nemotron family are expressible: Llama and Mixtral of transformers, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.llm.oracle  # noqa: F401  makes transformers importable
from llm.config import LLMConfig
from llm.model import LLM, LLMBatch
from llm.presets import preset
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared
from tests.llm.widened import Widened

from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # isort: skip

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
}
OURS: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "mlp_ffn": 24,
    "expert_ffn": 24,
}
TAIL = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head",
}
ATTENTION = {
    "input_layernorm.weight": "norm.weight",
    **{f"self_attn.{n}_proj.weight": f"mixer.{n}" for n in "qkv"},
    **{f"self_attn.{n}_proj.bias": f"mixer.{n}_bias" for n in "qkv"},
    "self_attn.o_proj.weight": "mixer.out.weight",
    "self_attn.o_proj.bias": "mixer.bias",
}
BRANCH = {
    "post_attention_layernorm.weight": "norm.weight",
    **{f"mlp.{n}_proj.{p}": f"mixer.{n}.{p}" for n in ("gate", "up") for p in ("weight", "bias")},
    "mlp.down_proj.weight": "mixer.down.weight",
    "mlp.down_proj.bias": "mixer.bias",
    "mlp.gate.weight": "mixer.router.weight",
    "mlp.experts.down_proj": "mixer.experts.down",
}


def translate(theirs: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Their tensors under our names; a block of theirs is two layers here."""
    out = {}
    for name, value in theirs.items():
        if name in TAIL:
            if not (tied and name == "lm_head.weight"):
                out[TAIL[name]] = value
            continue
        _, _, block, short = name.split(".", 3)
        attention, branch = (f"layers.{2 * int(block) + k}." for k in (0, 1))
        if short == "mlp.experts.gate_up_proj":
            gate, up = value.chunk(2, 1)
            out |= {f"{branch}mixer.experts.gate": gate, f"{branch}mixer.experts.up": up}
        elif short in ATTENTION:
            out[attention + ATTENTION[short]] = value
        else:
            out[branch + BRANCH[short]] = value
    return out


def randomise(model: nn.Module, theta: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # made in float32, whatever the model is converted to
            half = SIZES["head_dim"] // 2
            module.inv_freq = theta ** (-torch.arange(half, dtype=torch.float64) / half)


def llama(tied: bool) -> tuple[nn.Module, LLMConfig]:
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    config = LlamaConfig(
        **SIZES, attention_bias=not tied, mlp_bias=not tied, tie_word_embeddings=tied, rope_parameters=rope
    )
    cfg = replace(preset("llama-3-8b", **OURS), pattern="*-*-", tied=tied)
    return LlamaForCausalLM(config), replace(cfg, attention_bias=not tied, mlp_bias=not tied)


def mixtral() -> tuple[nn.Module, LLMConfig]:
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, rope_parameters=rope)
    config.sliding_window = None
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    # Its own balance loss is over all layers at once, unlike ours: without either.
    return model, replace(preset("mixtral-8x7b", **OURS), pattern="*E*E", aux_weight=0.0)


@pytest.mark.parametrize("kind", ["llama", "llama tied", "mixtral"])
def test_losses_and_gradients_are_theirs(kind: str) -> None:
    torch.manual_seed(0)
    theirs, cfg = mixtral() if kind == "mixtral" else llama("tied" in kind)
    theirs = theirs.double().train()
    assert cfg.rope_theta is not None
    randomise(theirs, cfg.rope_theta)
    ours = LLM(cfg, dtype=torch.float64)
    weights = translate({n: p.detach() for n, p in theirs.named_parameters()}, cfg.tied)
    ours.load_state_dict(weights, strict=False)
    assert weights.keys() == {n for n, _, _ in declared(ours)}
    ids = torch.randint(0, cfg.vocab_size, (19,))
    labels = torch.cat([ids[1:], torch.tensor([-100])])
    ours.train()
    loss = ours(LLMBatch(ids, labels, Packing.of([19]), 19, {}), {})
    with Widened():
        logits = theirs(input_ids=ids[None], use_cache=False).logits[0]
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    loss.sum().backward()
    expected.sum().backward()
    grads = translate({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, cfg.tied)
    for name, p, _ in declared(ours):
        assert p.grad is not None
        assert (p.grad - grads[name]).abs().max() <= 1e-10 * grads[name].abs().max(), name
