"""Blocks of Mamba-2 or attention in config.json, as Granite 4 H and Bamba have them. Pure."""

from __future__ import annotations

from typing import Any

from llm.config import LLMConfig
from llm.hf.experts import SOFTMAX
from llm.hf.family import Data
from llm.hf.nemotron_h import time_steps_are_free
from llm.hf.parts import Options, Part

# Names of layer kinds, the first of each is written.
KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"}


def mamba(heads: int = 128, state: int = 256, groups: int = 1, chunk: int = 256) -> Part:
    """The Mamba-2 mixer; values: of files without them."""

    def read(data: Data, known: Options) -> Options:
        for key, needed in {"mamba_conv_bias": True, "mamba_proj_bias": False}.items():
            if data.get(key, needed) != needed:
                raise ValueError(f"config.json has {key}={data[key]!r}; needed: {needed!r}")
        time_steps_are_free(data)
        n, width = data.get("mamba_n_heads", heads), data.get("mamba_expand", 2) * known["d_model"]
        dim = data.get("mamba_d_head", "auto")
        return {
            "mamba_heads": n,
            "mamba_head_dim": width // n if dim == "auto" else dim,
            "mamba_state": data.get("mamba_d_state", state),
            "mamba_groups": data.get("mamba_n_groups", groups),
            "conv_kernel": data.get("mamba_d_conv", 4),
            "chunk": data.get("mamba_chunk_size", chunk),
        }

    def write(cfg: LLMConfig) -> Options:
        if cfg.mamba_inner % cfg.d_model:
            raise ValueError(
                f"mamba_heads={cfg.mamba_heads} of mamba_head_dim={cfg.mamba_head_dim}; needed: together a "
                f"multiple of d_model={cfg.d_model}"
            )
        return {
            "mamba_n_heads": cfg.mamba_heads,
            "mamba_d_head": cfg.mamba_head_dim,
            "mamba_d_state": cfg.mamba_state,
            "mamba_n_groups": cfg.mamba_groups,
            "mamba_d_conv": cfg.conv_kernel,
            "mamba_expand": cfg.mamba_inner // cfg.d_model,
            "mamba_chunk_size": cfg.chunk,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        }

    return Part(read, write)


def bamba_blocks() -> Part:
    """Blocks of Mamba-2, but for those in attn_layer_indices, each with a dense MLP."""

    def read(data: Data, known: Options) -> Options:
        has = data.get("attn_layer_indices") or ()
        n = data.get("num_hidden_layers", 32)
        return {"pattern": "".join("*-" if i in has else "M-" for i in range(n))}

    def write(cfg: LLMConfig) -> Options:
        return {
            "num_hidden_layers": len(cfg.symbols) // 2,
            "attn_layer_indices": [i // 2 for i, symbol in enumerate(cfg.symbols) if symbol == "*"],
        }

    return Part(read, write)


def granite_blocks() -> Part:
    """Blocks listed by kind; all have experts with a shared one, or without experts that one alone."""

    def read(data: Data, known: Options) -> Options:
        n = data.get("num_hidden_layers", 32)
        names = data.get("layer_types") or data.get("layers_block_type") or ["mamba"] * n
        unknown = sorted(set(names) - KINDS.keys())
        if unknown or len(names) != n:
            raise ValueError(
                f"config.json has layer_types {unknown or len(names)}; needed: one of {', '.join(KINDS)} for "
                f"each of the {n} blocks"
            )
        shared, experts = data.get("shared_intermediate_size", 1024), data.get("num_local_experts", 8)
        second = "E" if experts else "-"
        out: dict[str, Any] = {"pattern": "".join(KINDS[name] + second for name in names)}
        if not experts:
            return out | {"mlp_ffn": shared}
        return {
            **out,
            **SOFTMAX,
            "n_experts": experts,
            "top_k": data.get("num_experts_per_tok", 2),
            "expert_ffn": data.get("intermediate_size", 11008),
            "shared_ffn": shared,
            "norm_top_k": True,
        }

    def write(cfg: LLMConfig) -> Options:
        sparse = "E" in cfg.kinds
        kinds = {"M": "mamba", "*": "attention"}
        return {
            "num_hidden_layers": len(cfg.symbols) // 2,
            "layer_types": [kinds.get(symbol, symbol) for symbol in cfg.symbols[::2]],
            "num_local_experts": cfg.n_experts if sparse else 0,
            "num_experts_per_tok": cfg.top_k if sparse else 0,
            "intermediate_size": cfg.expert_ffn if sparse else cfg.mlp_ffn,
            "shared_intermediate_size": cfg.shared_ffn if sparse else cfg.mlp_ffn,
        }

    return Part(read, write)
