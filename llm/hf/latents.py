"""Multi-head latent attention in config.json: its widths, and positions with two factors of yarn. Pure."""

from __future__ import annotations

import math

from llm.config import LLMConfig
from llm.hf.family import Data
from llm.hf.parts import Options, Part, neat
from llm.hf.rope import rope
from llm.rotary import RopeScaling

# Ours under their names, with the values of files without them.
WIDTHS = {
    "q_rank": ("q_lora_rank", 1536),
    "kv_rank": ("kv_lora_rank", 512),
    "rope_head_dim": ("qk_rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}


def latent_heads() -> Part:
    """Heads and widths of DeepSeek-V3; q_lora_rank may be null. Files have the features of a head without and
    with positions apart."""

    def read(data: Data, known: Options) -> Options:
        many = data.get("num_attention_heads", 128)
        few = data.get("num_key_value_heads", 128)
        if few is not None and few != many:
            raise ValueError(f"config.json has num_key_value_heads={few}; needed: {many}, as many as heads")
        widths = {ours: data.get(theirs, default) for ours, (theirs, default) in WIDTHS.items()}
        head_dim = data.get("qk_nope_head_dim", 128) + widths["rope_head_dim"]
        turned = data.get("rope_interleave", True)
        return {
            **widths,
            "n_heads": many,
            "n_kv_heads": many,
            "head_dim": head_dim,
            "rope_interleaved": True if turned is None else turned,
        }

    def write(cfg: LLMConfig) -> Options:
        if cfg.kv_rank is None or cfg.rope_head_dim is None:
            raise ValueError("kv_rank=None; needed: the width of a latent of keys and values, such as 512")
        widths = {theirs: getattr(cfg, ours) for ours, (theirs, _) in WIDTHS.items()}
        return {
            **widths,
            "v_head_dim": cfg.value_dim,
            "qk_nope_head_dim": cfg.head_dim - cfg.rope_head_dim,
            "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_kv_heads,
            "rope_interleave": cfg.rope_interleaved,
        }

    return Part(read, write)


def rope_of_latents() -> Part:
    """Rotary positions whose mscale_all_dim is also a factor on scores, squared: attention_scale."""
    turned = rope()

    def read(data: Data, known: Options) -> Options:
        out = turned.read(data, known)
        given = data.get("rope_scaling") or data.get("rope_parameters") or {}
        every, scaling = given.get("mscale_all_dim"), out["rope_scaling"]
        if not every or scaling is None:
            return out
        return {**out, "attention_scale": known["head_dim"] ** -0.5 * _mscale(scaling, every) ** 2}

    def write(cfg: LLMConfig) -> Options:
        out, scaling = turned.write(cfg), cfg.rope_scaling
        if cfg.attention_scale is None:
            return out
        grown = math.sqrt(cfg.attention_scale * cfg.head_dim**0.5)
        if scaling is None or scaling.factor <= 1:
            raise ValueError(f"attention_scale={cfg.attention_scale} without rope_scaling; needed: None")
        slope = 0.1 * math.log(scaling.factor)
        said = {"mscale_all_dim": neat((grown - 1.0) / slope)}
        if scaling.attention_factor is not None:
            # Their quotient is that factor: readers from before it know these two alone.
            said["mscale"] = neat((scaling.attention_factor * grown - 1.0) / slope)
        for key in ("rope_parameters", "rope_scaling"):
            out[key] = {**out[key], **said}
        return out

    return Part(read, write)


def _mscale(scaling: RopeScaling, slope: float) -> float:
    grown = math.log(scaling.factor) if scaling.factor > 1 else 0.0
    return 0.1 * slope * grown + 1.0
