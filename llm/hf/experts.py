"""Experts in config.json: which blocks have them, how they are chosen, the shared one. Pure."""

from __future__ import annotations

from typing import Any

from llm.config import LLMConfig
from llm.hf.family import Data
from llm.hf.parts import Options, Part

# Experts of softmax families are selected by their scores alone.
SOFTMAX: dict[str, Any] = {"router": "softmax", "routed_scale": 1.0, "expert_bias_rate": 0.0}


def softmax_experts(key: str, count: int, chosen: int, norm: bool | None = None) -> Part:
    """Experts with softmax scores and no shared one; count, chosen: of files without them.

    key: of their number. norm: norm_topk_prob of files without it; None: always normed, and never said.
    """

    def read(data: Data, known: Options) -> Options:
        n = data.get(key, data.get("num_local_experts", data.get("num_experts", count)))
        return {
            **SOFTMAX,
            "n_experts": n,
            "top_k": data.get("num_experts_per_tok", chosen),
            "norm_top_k": True if norm is None else data.get("norm_topk_prob", norm),
            "shared_ffn": 0,
        }

    def write(cfg: LLMConfig) -> Options:
        said = {} if norm is None else {"norm_topk_prob": cfg.norm_top_k}
        return {key: cfg.n_experts, "num_experts_per_tok": cfg.top_k, **said}

    return Part(read, write)


def sparse_blocks(count: int) -> Part:
    """Qwen 3 MoE's blocks: every decoder_sparse_step-th has experts, but those in mlp_only_layers."""

    def read(data: Data, known: Options) -> Options:
        n, step = data.get("num_hidden_layers", count), data.get("decoder_sparse_step", 1)
        dense = data.get("mlp_only_layers") or ()
        has = [i not in dense and (i + 1) % step == 0 for i in range(n)]
        return {"pattern": "".join("*E" if sparse else "*-" for sparse in has)}

    def write(cfg: LLMConfig) -> Options:
        dense = [i // 2 for i, symbol in enumerate(cfg.symbols) if symbol == "-"]
        return {
            "num_hidden_layers": len(cfg.symbols) // 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
        }

    return Part(read, write)


def late_blocks(count: int, dense: int) -> Part:
    """Blocks of which the first first_k_dense_replace have a dense MLP, the others experts."""

    def read(data: Data, known: Options) -> Options:
        n, first = data.get("num_hidden_layers", count), data.get("first_k_dense_replace", dense)
        return {"pattern": "*-" * min(first, n) + "*E" * max(n - first, 0)}

    def write(cfg: LLMConfig) -> Options:
        return {
            "num_hidden_layers": len(cfg.symbols) // 2,
            "first_k_dense_replace": cfg.symbols.count("-"),
        }

    return Part(read, write)


def sigmoid_experts(
    count: int, chosen: int, scale: float, width: int, groups: tuple[int, int] = (1, 1)
) -> Part:
    """DeepSeek's router with shared experts of the routed ones' width; values: of files without them, groups
    and how many of them are taken among these."""

    def read(data: Data, known: Options) -> Options:
        ffn = data.get("moe_intermediate_size", width)
        return {
            "n_experts": data.get("n_routed_experts", data.get("num_local_experts", count)),
            "top_k": data.get("num_experts_per_tok", chosen),
            "expert_ffn": ffn,
            "shared_ffn": ffn * data.get("n_shared_experts", 1),
            "routed_scale": data.get("routed_scaling_factor", scale),
            "expert_groups": data.get("n_group", groups[0]),
            "top_groups": data.get("topk_group", groups[1]),
            "norm_top_k": data.get("norm_topk_prob", True),
            "router": "sigmoid",
        }

    def write(cfg: LLMConfig) -> Options:
        return {
            "n_routed_experts": cfg.n_experts,
            "num_experts_per_tok": cfg.top_k,
            "moe_intermediate_size": cfg.expert_ffn,
            "n_shared_experts": cfg.shared_ffn // cfg.expert_ffn,
            "routed_scaling_factor": cfg.routed_scale,
            "n_group": cfg.expert_groups,
            "topk_group": cfg.top_groups,
            "norm_topk_prob": cfg.norm_top_k,
            "num_nextn_predict_layers": 0,
        }

    return Part(read, write)
