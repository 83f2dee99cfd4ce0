"""The families of language models that can be read and written, each a list of parts and a table. Pure.

To add one: its parts of config.json (llm.hf.parts, with the defaults of its configuration class), and the
rows in which its tensors differ from those of llm.hf.decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llm.hf.decoder import (
    APART,
    EMBED,
    FUSED,
    GRANITE_DENSE,
    GRANITE_SHARED,
    HEAD,
    OUTSIDE,
    SECOND,
    STACKED,
    TABLE,
    Rows,
    block_rows,
    dense,
    joined_dense,
    listed_experts,
    norms,
    one_block_more,
    stored_speeds,
)
from llm.hf.experts import late_blocks, sigmoid_experts, softmax_experts, sparse_blocks
from llm.hf.family import Data, Family
from llm.hf.hybrid import bamba_blocks, granite_blocks, mamba
from llm.hf.parts import (
    Part,
    activation,
    blocks,
    causal,
    field,
    head_norms,
    heads,
    multipliers,
    no_rope_layers,
    nullable,
    ours,
    query_scale,
    read_parts,
    scaled_embedding,
    sizes,
    tie,
    write_parts,
)
from llm.hf.rope import rope, rope_by_window, rope_or_none
from llm.hf.windows import window
from parallel.published.tables import Row


def decoder(
    name: str, title: str, architecture: str, parts: Sequence[Part], outside: Rows = OUTSIDE, **table: Rows
) -> Family:
    """A family of decoders; table: rows of attention, dense and experts that are not the usual ones."""
    named = {"attention": "*", "dense": "-", "experts": "E"}
    rows = TABLE | {named[kind]: held for kind, held in table.items()}
    return Family(
        name,
        title,
        architecture,
        lambda data: read_parts(parts, data),
        lambda cfg: write_parts(parts, cfg),
        lambda cfg: block_rows(cfg, rows, outside),
        stem="model.",
        ignored=stored_speeds,
    )


def dense_ffn(default: int) -> Part:
    """Hidden width of dense MLPs; default: of files without it."""
    return field("mlp_ffn", "intermediate_size", default)


def switch(name: str) -> Part:
    """An option that is alike here and there, and off in files without it."""
    return field(name, name, default=False)


FOUR_BIASES = switch("attention_bias")
THREE_BIASES = Part(
    lambda data, known: {"qkv_bias": data.get("attention_bias", False)},
    lambda cfg: {"attention_bias": cfg.qkv_bias},
)
LLAMA_PARTS = (
    *sizes(32000, 4096),
    blocks(32),
    heads(32, whole=True),
    FOUR_BIASES,
    dense_ffn(11008),
    switch("mlp_bias"),
    activation(),
    rope(),
    tie(),
)

LLAMA = decoder("llama", "Llama", "Llama", LLAMA_PARTS)

MISTRAL = decoder(
    "mistral",
    "Mistral",
    "Mistral",
    (
        *sizes(32000, 4096),
        blocks(32),
        heads(32, 8),
        dense_ffn(14336),
        activation(),
        rope(),
        window(4096),
        tie(),
    ),
)

MIXTRAL = decoder(
    "mixtral",
    "Mixtral",
    "Mixtral",
    (
        *sizes(32000, 4096, 1e-5),
        blocks(32, "E"),
        heads(32, 8),
        field("expert_ffn", "intermediate_size", 14336),
        softmax_experts("num_local_experts", 8, 2),
        activation(),
        rope(1e6),
        window(),
        tie(),
    ),
    experts=(*SECOND, *listed_experts("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})),
)


def _qwen_listed(data: Data, block: int) -> bool:
    return bool(block >= data.get("max_window_layers", 28))


QWEN2 = decoder(
    "qwen2",
    "Qwen 2 and 2.5",
    "Qwen2",
    (
        *sizes(151936, 4096),
        blocks(32),
        heads(32, 32),
        ours(qkv_bias=True),
        dense_ffn(22016),
        activation(),
        rope(axes=True),
        window(4096, listed=_qwen_listed, switch=True),
        tie(),
    ),
)

QWEN3 = decoder(
    "qwen3",
    "Qwen 3",
    "Qwen3",
    (
        *sizes(151936, 4096),
        blocks(32),
        heads(32, 32, 128),
        ours(qk_norm="head"),
        FOUR_BIASES,
        dense_ffn(22016),
        activation(),
        rope(axes=True),
        window(4096, listed=_qwen_listed, switch=True),
        tie(),
    ),
)

QWEN3_MOE = decoder(
    "qwen3_moe",
    "Qwen 3 MoE",
    "Qwen3Moe",
    (
        *sizes(151936, 2048),
        sparse_blocks(24),
        heads(32, 4),
        ours(qk_norm="head"),
        FOUR_BIASES,
        dense_ffn(6144),
        field("expert_ffn", "moe_intermediate_size", 768),
        softmax_experts("num_experts", 128, 8, norm=False),
        activation(),
        rope(axes=True),
        window(4096, switch=True),
        tie(),
    ),
)

SMOLLM3 = decoder(
    "smollm3",
    "SmolLM3",
    "SmolLM3",
    (
        *sizes(128256, 2048),
        blocks(36),
        heads(16, 4),
        FOUR_BIASES,
        dense_ffn(11008),
        switch("mlp_bias"),
        activation(),
        rope(2e6),
        no_rope_layers(),
        # Where it has windows, layers without positions have them.
        window(listed=lambda data, block: not _turned(data, block), switch=True),
        tie(default=True),
    ),
)


def _turned(data: Data, block: int) -> bool:
    listed = data.get("no_rope_layers")
    return bool(listed[block] if listed else (block + 1) % data.get("no_rope_layer_interval", 4))


PHI3 = decoder(
    "phi3",
    "Phi-3 and Phi-4",
    "Phi3",
    (
        *sizes(32064, 3072, 1e-5),
        blocks(32),
        heads(32),
        dense_ffn(8192),
        activation(),
        rope(share=1.0, outside=True),
        window(),
        tie(),
    ),
    attention=(*TABLE["*"][:1], *FUSED),
    dense=(*SECOND, *joined_dense("mlp.gate_up_proj", "mlp.down_proj")),
)

AFTER: dict[str, Rows] = {
    "attention": (*norms(None, "post_attention_layernorm"), *APART),
    "dense": (*norms(None, "post_feedforward_layernorm"), *dense()),
}
OLMO_PARTS = (
    *sizes(50304, 4096, 1e-5),
    blocks(32),
    heads(32),
    ours(qk_norm="full", norms="after"),
    FOUR_BIASES,
    dense_ffn(11008),
    activation(),
    tie(),
)

OLMO2 = decoder("olmo2", "OLMo 2", "Olmo2", (*OLMO_PARTS, rope()), **AFTER)

OLMO3 = decoder(
    "olmo3",
    "OLMo 3",
    "Olmo3",
    (
        *OLMO_PARTS,
        window(4096, listed=lambda data, block: (block + 1) % 4 != 0),
        rope_by_window(5e5, 5e5),
    ),
    **AFTER,
)

BOTH: dict[str, Rows] = {
    "attention": (*norms("input_layernorm", "post_attention_layernorm"), *APART),
    "dense": (*norms("pre_feedforward_layernorm", "post_feedforward_layernorm"), *dense()),
}
GEMMA_PARTS = (
    scaled_embedding(),
    heads(8, 4, 256, whole=True),
    query_scale(),
    ours(norms="both", norm_shift=True),
    FOUR_BIASES,
    dense_ffn(9216),
    activation("hidden_activation", "gelu_pytorch_tanh"),
    causal(),
    tie(default=True),
)

GEMMA2 = decoder(
    "gemma2",
    "Gemma 2",
    "Gemma2",
    (
        *sizes(256000, 2304),
        blocks(26),
        *GEMMA_PARTS,
        nullable("attention_cap", "attn_logit_softcapping", 50.0),
        nullable("logit_cap", "final_logit_softcapping", 30.0),
        window(4096, listed=lambda data, block: (block + 1) % 2 != 0),
        rope(),
    ),
    **BOTH,
)

GEMMA3 = decoder(
    "gemma3_text",
    "Gemma 3 (text)",
    "Gemma3",
    (
        *sizes(262208, 2304),
        blocks(26),
        *GEMMA_PARTS,
        ours(qk_norm="head"),
        nullable("attention_cap", "attn_logit_softcapping", None),
        nullable("logit_cap", "final_logit_softcapping", None),
        window(4096, listed=lambda data, block: (block + 1) % data.get("sliding_window_pattern", 6) != 0),
        rope_by_window(1e6, 1e4, "rope_local_base_freq"),
    ),
    **BOTH,
)

GLM4_MOE = replace(
    decoder(
        "glm4_moe",
        "GLM-4.5 MoE",
        "Glm4Moe",
        (
            *sizes(151552, 4096, 1e-5),
            late_blocks(46, 1),
            heads(96, 8),
            THREE_BIASES,
            head_norms(),
            dense_ffn(10944),
            sigmoid_experts(128, 8, 1.0, 1408),
            activation(),
            rope(share=0.5),
            tie(),
        ),
    ),
    ignored=one_block_more,
    selection_bias=True,
)

GRANITE = replace(decoder("granite", "Granite", "Granite", (*LLAMA_PARTS, multipliers())), scales_rows=True)

_GRANITE_HYBRID = decoder(
    "granitemoehybrid",
    "Granite 4 H",
    "GraniteMoeHybrid",
    (
        *sizes(32000, 4096),
        granite_blocks(),
        heads(32),
        FOUR_BIASES,
        mamba(),
        activation(),
        rope_or_none(),
        multipliers(),
        tie(),
    ),
    experts=(*SECOND, *STACKED, *GRANITE_SHARED),
    dense=(*SECOND, *GRANITE_DENSE),
)
GRANITE_HYBRID = replace(_GRANITE_HYBRID, scales_rows=True)

BAMBA = decoder(
    "bamba",
    "Bamba",
    "Bamba",
    (
        *sizes(128000, 4096, 1e-5),
        bamba_blocks(),
        heads(32, 8),
        FOUR_BIASES,
        mamba(),
        dense_ffn(14336),
        switch("mlp_bias"),
        activation(),
        rope(fixed_share=0.5),
        tie(),
    ),
    (EMBED, Row("model.final_layernorm.weight", ("norm.weight",)), HEAD),
    dense=(*norms("pre_ff_layernorm"), *dense("feed_forward")),
)
