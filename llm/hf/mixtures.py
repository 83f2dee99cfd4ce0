"""The families of language models whose blocks are more than a decoder's switches. Pure."""

from __future__ import annotations

from dataclasses import replace

from llm.hf.decoder import CLAMPED, FIRST, LATENT, SECOND, SINKS, TABLE, one_block_more
from llm.hf.experts import late_blocks, sigmoid_experts, softmax_experts
from llm.hf.families import decoder, dense_ffn, switch
from llm.hf.latents import latent_heads, rope_of_latents
from llm.hf.parts import activation, blocks, clamped, field, heads, only, ours, sizes, tie
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

DEEPSEEK_V3 = replace(
    decoder(
        "deepseek_v3",
        "DeepSeek-V3",
        "DeepseekV3",
        (
            *sizes(129280, 7168),
            late_blocks(61, 3),
            latent_heads(),
            switch("attention_bias"),
            dense_ffn(18432),
            sigmoid_experts(256, 8, 2.5, 2048, (8, 4)),
            only(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1),
            activation(),
            rope_of_latents(),
            tie(),
        ),
        attention=(*FIRST, *LATENT),
    ),
    ignored=one_block_more,
    selection_bias=True,
)
