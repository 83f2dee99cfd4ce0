"""The families of language models whose blocks are more than a decoder's switches. Pure."""

from __future__ import annotations

from llm.hf.decoder import CLAMPED, SECOND, SINKS, TABLE
from llm.hf.experts import softmax_experts
from llm.hf.families import decoder
from llm.hf.parts import blocks, clamped, field, heads, ours, sizes, tie
from llm.hf.rope import rope
from llm.hf.windows import window

# Of files without rotary positions.
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

GPT_OSS = decoder(
    "gpt_oss",
    "GPT-OSS",
    "GptOss",
    (
        *sizes(201088, 2880, 1e-5),
        blocks(36, "E"),
        heads(64, 8, 64),
        field("attention_bias", "attention_bias", default=True),
        ours(attention_sinks=True, moe_bias=True),
        field("expert_ffn", "intermediate_size", 2880),
        softmax_experts("num_local_experts", 128, 4),
        clamped(),
        window(128, listed=lambda data, block: (block + 1) % 2 != 0),
        rope(150000.0, scaled=GPT_OSS_ROPE),
        tie(),
    ),
    attention=(*TABLE["*"], *SINKS),
    experts=(*SECOND, *CLAMPED),
)
