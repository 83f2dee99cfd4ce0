"""Rotary positions in config.json: the newer key rope_parameters, and the older ones it replaced. Pure."""

from __future__ import annotations

from llm.config import LLMConfig
from llm.hf.family import Data
from llm.hf.parts import Options, Part


def rope(theta: float = 10000.0) -> Part:
    """Rotary positions of all attention layers; theta: of files without it."""

    def read(data: Data, known: Options) -> Options:
        given = data.get("rope_scaling") or data.get("rope_parameters") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json has rope_type={kind!r}; needed: 'default'")
        base = given.get("rope_theta", data.get("rope_theta"))
        return {"rope_theta": float(theta if base is None else base)}

    def write(cfg: LLMConfig) -> Options:
        if cfg.rope_theta is None:
            raise ValueError("rope_theta=None; needed: a base of rotary positions")
        # Both spellings: a reader of one ignores the other.
        said = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        return {"rope_parameters": said, "rope_theta": cfg.rope_theta}

    return Part(read, write)
