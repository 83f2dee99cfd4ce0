"""Tiny random models of every family in transformers, made from config objects: the oracles of ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.llm.oracle  # noqa: F401  makes transformers importable
from tests.llm.widened import Widened

import transformers  # isort: skip

Options = dict[str, Any]

SIZES: Options = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def heads(r: random.Random, *, free_head_dim: bool = True) -> Options:
    """Odd heads, grouped or not; a head's width that is not that of the model over the heads."""
    n, kv = r.choice([(4, 2), (3, 1), (3, 3), (6, 2)])
    dim = {"head_dim": r.choice([8, 12, 4])} if free_head_dim else {}
    return {"hidden_size": 8 * n, "num_attention_heads": n, "num_key_value_heads": kv, **dim}


def flip(r: random.Random, *names: str) -> Options:
    return {name: r.random() < 0.5 for name in names}


def turns(r: random.Random, *kinds: str, **beside: Any) -> Options:
    """Rotary positions of one of `kinds`; the context of training is shorter than what is computed."""
    theta = {"rope_theta": r.choice([1e4, 5e5])}
    known: dict[str, Options] = {
        "default": {},
        "linear": {"factor": 3.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
    }
    kind = r.choice(kinds)
    return {"rope_parameters": {"rope_type": kind, **known[kind], **theta, **beside}}


def listed(r: random.Random, n: int = 3) -> Options:
    kinds = r.choices(["sliding_attention", "full_attention"], k=n)
    return {"num_hidden_layers": n, "layer_types": kinds, "sliding_window": r.choice([1, 4, 9])}


def sparse(r: random.Random, **names: str) -> Options:
    """A number of experts and how many a token goes to."""
    n = r.choice([2, 5, 8])
    return {names.get("n", "num_experts"): n, "num_experts_per_tok": r.randint(1, n)}


def llama(r: random.Random) -> Options:
    kinds = turns(r, "default", "linear", "llama3", "yarn")
    return heads(r) | kinds | flip(r, "attention_bias", "mlp_bias", "tie_word_embeddings")


def mistral(r: random.Random) -> Options:
    return heads(r) | turns(r, "default", "yarn") | {"sliding_window": r.choice([None, 5, 64])}


def mixtral(r: random.Random) -> Options:
    window = {"sliding_window": r.choice([None, 6])}
    return heads(r) | turns(r, "default") | sparse(r, n="num_local_experts") | window


def qwen2(r: random.Random) -> Options:
    windows = r.choice([{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}])
    plain = heads(r, free_head_dim=False) | turns(r, "default", "yarn")
    return plain | windows | flip(r, "tie_word_embeddings")


def qwen3(r: random.Random) -> Options:
    return heads(r) | turns(r, "default", "yarn") | flip(r, "attention_bias", "tie_word_embeddings")


def qwen3_moe(r: random.Random) -> Options:
    which = {"mlp_only_layers": r.choice([[], [1]]), "decoder_sparse_step": r.choice([1, 2])}
    switches = flip(r, "norm_topk_prob", "tie_word_embeddings", "attention_bias")
    sizes = {"num_hidden_layers": 3, "moe_intermediate_size": 20}
    return heads(r) | turns(r, "default") | sparse(r) | switches | which | sizes


def smollm3(r: random.Random) -> Options:
    n = r.choice([2, 5])
    which = r.choice([{}, {"no_rope_layers": [r.randint(0, 1) for _ in range(n)]}])
    options = heads(r, free_head_dim=False) | turns(r, "default", "yarn") | {"num_hidden_layers": n} | which
    windows = r.choice([{}, {"use_sliding_window": True, "sliding_window": 5}])
    return options | windows | flip(r, "attention_bias", "mlp_bias")


def phi3(r: random.Random) -> Options:
    n = r.choice([3, 4])
    share = r.choice([1.0, 0.5])
    pairs = int(8 * share) // 2
    rope: Options = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    if r.random() < 0.6:
        rope |= {"rope_type": "longrope"}
        rope["short_factor"] = [1.0 + 0.3 * i for i in range(pairs)]
        rope["long_factor"] = [2.0 + 0.7 * i for i in range(pairs)]
    return {
        "hidden_size": 8 * n,
        "num_attention_heads": n,
        "num_key_value_heads": r.choice([1, n]),
        "rope_parameters": rope,
        "original_max_position_embeddings": r.choice([16, 64]),
        "sliding_window": r.choice([None, 6]),
    } | flip(r, "tie_word_embeddings")


def olmo2(r: random.Random) -> Options:
    return heads(r, free_head_dim=False) | turns(r, "default") | flip(r, "attention_bias")


def olmo3(r: random.Random) -> Options:
    full = turns(r, "default", "yarn")["rope_parameters"]
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return heads(r, free_head_dim=False) | listed(r) | {"rope_parameters": rope}


def gemma2(r: random.Random) -> Options:
    caps = {"attn_logit_softcapping": r.choice([None, 5.0]), "final_logit_softcapping": r.choice([None, 7.0])}
    scale = {"query_pre_attn_scalar": r.choice([8, 11])}
    return heads(r) | listed(r) | caps | scale | turns(r, "default") | flip(r, "attention_bias")


def gemma3(r: random.Random) -> Options:
    full = turns(r, "default", "linear")["rope_parameters"]
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}
    scale = {"query_pre_attn_scalar": r.choice([8, 11])}
    return heads(r) | listed(r) | scale | {"rope_parameters": rope}


def late_experts(r: random.Random, n: int, groups: int) -> Options:
    """DeepSeek's router and n experts in groups, behind dense blocks."""
    return {
        "num_hidden_layers": 3,
        "first_k_dense_replace": r.choice([0, 1, 2]),
        "moe_intermediate_size": 20,
        "n_routed_experts": n,
        "n_group": groups,
        "topk_group": r.randint(1, groups),
        "num_experts_per_tok": 2,
        "n_shared_experts": r.choice([1, 2]),
        "routed_scaling_factor": r.choice([1.0, 2.5]),
    }


def glm4_moe(r: random.Random) -> Options:
    n, groups = r.choice([(8, 1), (8, 2), (8, 4)])
    return (
        heads(r)
        | flip(r, "attention_bias", "use_qk_norm", "norm_topk_prob")
        | late_experts(r, n, groups)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    )


def granite(r: random.Random) -> Options:
    return llama(r) | granite_factors(r)


def granite_factors(r: random.Random) -> Options:
    return {
        "embedding_multiplier": r.choice([12.0, 3]),
        "residual_multiplier": 0.22,
        "attention_multiplier": r.choice([0.015625, 0.2]),
        "logits_scaling": r.choice([8.0, 3.0]),
    }


def mixers(r: random.Random) -> Options:
    """Sizes of Mamba-2 for a width of 32."""
    n = r.choice([4, 8])
    return {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": r.choice([1, 2]),
        "mamba_n_heads": n,
        "mamba_d_head": 64 // n,
        "mamba_n_groups": r.choice([1, 2]),
        "mamba_d_state": 12,
        "mamba_d_conv": r.choice([2, 4]),
        "mamba_expand": 2,
        "mamba_chunk_size": 8,
    }


def granitemoehybrid(r: random.Random) -> Options:
    n, kinds = r.choice([0, 5]), ("linear_attention", "full_attention")
    sizes = {
        "num_hidden_layers": 3,
        "layer_types": [*kinds, r.choice(kinds)],
        "num_local_experts": n,
        "num_experts_per_tok": min(n, 3),
        "shared_intermediate_size": 40,
        "position_embedding_type": r.choice(["rope", None]),
    }
    return mixers(r) | granite_factors(r) | sizes | flip(r, "tie_word_embeddings")


def bamba(r: random.Random) -> Options:
    sizes = {"num_hidden_layers": 3, "attn_layer_indices": [1]}
    return mixers(r) | sizes | flip(r, "mlp_bias", "attention_bias")


def gpt_oss(r: random.Random) -> Options:
    yarn = turns(r, "yarn", truncate=r.random() < 0.5)
    sizes = {"intermediate_size": r.choice([20, 33])}
    switches = flip(r, "attention_bias", "tie_word_embeddings")
    return heads(r) | listed(r) | yarn | sparse(r, n="num_local_experts") | sizes | switches


def deepseek_v3(r: random.Random) -> Options:
    n, groups = r.choice([(8, 1), (8, 2), (8, 4)])
    over = r.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}])
    rope = turns(r, "yarn", **(over or {"mscale_all_dim": 0.8})) if r.random() < 0.7 else turns(r, "default")
    many = r.choice([3, 4])
    widths = {"qk_nope_head_dim": r.choice([6, 5]), "qk_rope_head_dim": r.choice([4, 8])}
    return (
        rope
        | widths
        | flip(r, "attention_bias", "rope_interleave", "norm_topk_prob", "tie_word_embeddings")
        | {
            "num_attention_heads": many,
            "num_key_value_heads": many,
            "q_lora_rank": r.choice([None, 12]),
            "kv_lora_rank": r.choice([7, 16]),
            "v_head_dim": r.choice([6, 20]),
        }
        | late_experts(r, n, groups)
    )


def nemotron_h(r: random.Random) -> Options:
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    pattern = [*r.sample(kinds, 4), r.choice(kinds)]
    return {
        "layers_block_type": pattern,
        "num_hidden_layers": None,
        "num_attention_heads": 4,
        "num_key_value_heads": r.choice([1, 2, 4]),
        "head_dim": 8,
        "ssm_state_size": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": r.choice([1, 2]),
        "conv_kernel": 4,
        "chunk_size": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": r.choice([2, 3]),
        "moe_intermediate_size": 20,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": r.choice([None, 16]),
        "routed_scaling_factor": 2.5,
    }


# By model_type: random options beyond SIZES, in which every switch of the family appears.
RANDOM: dict[str, Callable[[random.Random], Options]] = {
    "nemotron_h": nemotron_h,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "phi3": phi3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "glm4_moe": glm4_moe,
    "granite": granite,
    "granitemoehybrid": granitemoehybrid,
    "bamba": bamba,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
}


def options(name: str, seed: int) -> Options:
    """The options of a random model of a family."""
    return SIZES | RANDOM[name](random.Random(seed))


def even(name: str, seed: int) -> Options:
    """The same, of sizes that two ranks divide."""
    kv = 4 if name == "deepseek_v3" else 2
    return options(name, seed) | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": kv}


def config_of(name: str, given: Options) -> Any:
    """A config object of transformers."""
    return transformers.AutoConfig.for_model(name, **given, attn_implementation="eager")


def build(config: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random model in which nothing is at a special value that could hide a mistake.

    In float64 its rotary angles are too: transformers makes them in float32, whatever it is converted to.
    """
    torch.manual_seed(seed)
    with Widened() if dtype == torch.float64 else nullcontext():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    prepare(model)
    with torch.no_grad():
        for n, param in model.named_parameters():
            if param.ndim == 1 and "A_log" not in n:
                param.add_(0.3 * torch.randn_like(param))
            elif n.endswith("_proj_bias"):
                param.add_(4.0 * torch.randn_like(param))  # of stacked experts: some reach gpt-oss's clamp
            else:
                param.mul_(4.0)  # the default deviation makes branches too weak next to the residual
        for n, buffer in model.named_buffers():
            if n.endswith("e_score_correction_bias"):
                # Far from zero, so that choosing with the bias differs from weighting without it.
                buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel())[torch.randperm(buffer.numel())])
    return model.train()


def prepare(model: Any) -> Any:
    """Experts one by one, as grouped products do not know float64; Nemotron-H's time steps unclamped, as its
    published models were trained."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def save(model: nn.Module, path: Path, **options: Any) -> Path:
    """The model in its published format."""
    model.save_pretrained(path, **options)
    return path


def run(model: Any, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocab] in the model's own dtype throughout."""
    if model.dtype == torch.float64:
        with Widened():
            return model(input_ids=ids, use_cache=False).logits
    return model(input_ids=ids, use_cache=False).logits


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def ids_of(vocab: int = 96, length: int = 21) -> Tensor:
    """Two sequences of tokens; 21 is no multiple of a chunk of the scan."""
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))
