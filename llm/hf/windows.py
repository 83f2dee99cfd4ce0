"""Windows of attention in config.json: of all layers, or of those that layer_types lists. Pure."""

from __future__ import annotations

from collections.abc import Callable

from llm.config import LLMConfig
from llm.hf.family import Data
from llm.hf.parts import Options, Part
from llm.hf.rope import FULL, WINDOWED

Listed = Callable[[Data, int], bool]
"""Whether block i of a file without layer_types has the window."""


def window(default: int | None = None, *, listed: Listed | None = None, switch: bool = False) -> Part:
    """The window of attention layers.

    default: sliding_window of files without it. listed: see Listed; None: all layers have it, and files have
    no layer_types. switch: whether the window acts only where use_sliding_window is true.
    """

    def read(data: Data, known: Options) -> Options:
        keys = data.get("sliding_window", default)
        if switch and not data.get("use_sliding_window", False):
            keys = None
        if listed is None:
            return {"window": keys}
        attention = [i for i, symbol in enumerate(known["pattern"]) if symbol == "*"]
        types = data.get("layer_types")
        if types is None:
            types = [WINDOWED if listed(data, i) else FULL for i in range(len(attention))]
        unknown = sorted(set(types) - {FULL, WINDOWED})
        if unknown or len(types) != len(attention):
            raise ValueError(
                f"config.json has layer_types {unknown or len(types)}; needed: {FULL} or {WINDOWED} for each "
                f"of the {len(attention)} blocks"
            )
        layers = tuple(i for i, kind in zip(attention, types, strict=True) if kind == WINDOWED)
        if keys is None or not layers:
            return {"window": None}
        return {"window": keys, "window_layers": None if len(layers) == len(attention) else layers}

    def write(cfg: LLMConfig) -> Options:
        out: Options = {"sliding_window": cfg.window}
        if switch:
            out["use_sliding_window"] = cfg.window is not None
        if listed is not None:
            attention = [i for i, symbol in enumerate(cfg.symbols) if symbol == "*"]
            has = attention if cfg.window_layers is None else cfg.window_layers
            held = has if cfg.window is not None else ()
            # transformers wants a window of these families even where no layer has it.
            out["sliding_window"] = cfg.window or (None if switch else default)
            out["layer_types"] = [WINDOWED if i in held else FULL for i in attention]
        return out

    return Part(read, write)
