"""Rotary positions in config.json: the key rope_parameters, and the older ones that it replaced. Pure."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from llm.config import LLMConfig
from llm.hf.family import Data
from llm.hf.parts import Options, Part
from llm.rotary import RopeAxes, RopeScaling

# Fields of RopeScaling under their published names.
NAMES = {
    "kind": "rope_type",
    "factor": "factor",
    "original": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "short": "short_factor",
    "long": "long_factor",
}
SECTIONS, INTERLEAVED = "mrope_section", "mrope_interleaved"  # of RopeAxes
FULL, WINDOWED = "full_attention", "sliding_attention"


def rope(
    theta: float = 10000.0,
    *,
    share: float | None = None,
    fixed_share: float | None = None,
    outside: bool = False,
    axes: bool = False,
) -> Part:
    """Rotary positions, alike in all attention layers.

    theta: of files without it. share: partial_rotary_factor of files without it; None: the family has none.
    fixed_share: the one of all models, whatever files say. outside: original_max_position_embeddings is a key
    of its own (Phi-3). axes: whether positions may have three axes (Qwen).
    """

    def read(data: Data, known: Options) -> Options:
        given = data.get("rope_scaling") or data.get("rope_parameters") or {}
        base = given.get("rope_theta", data.get("rope_theta"))
        part = given.get("partial_rotary_factor", data.get("partial_rotary_factor"))
        if fixed_share is not None or part is None:
            part = fixed_share or share or 1.0
        if part != 1 and share is None and fixed_share is None:
            raise ValueError(
                f"config.json has partial_rotary_factor={part}; needed: 1, as all models of the family"
            )
        return {
            "rope_theta": float(theta if base is None else base),
            "rope_scaling": read_scaling(given, data, axes=axes),
            "rope_axes": read_axes(given) if axes else None,
            "rope_share": float(part),
        }

    def write(cfg: LLMConfig) -> Options:
        if cfg.rope_theta is None:
            raise ValueError("rope_theta=None; needed: a base of rotary positions")
        said = {**write_scaling(cfg.rope_scaling), "rope_theta": cfg.rope_theta}
        if axes and cfg.rope_axes is not None:
            said |= write_axes(cfg.rope_axes)
        if share is not None or fixed_share is not None:
            said["partial_rotary_factor"] = cfg.rope_share
        key = NAMES["original"]
        extra = {key: said[key]} if outside and key in said else {}
        return {"rope_parameters": said, **_older(said), **extra}

    return Part(read, write)


def rope_by_window(theta: float, local: float, local_key: str | None = None) -> Part:
    """Rotary positions with a base of windowed layers' own, which have no scaling.

    theta, local: bases of files without them; local_key: the older key of the second.
    """

    def read(data: Data, known: Options) -> Options:
        given = data.get("rope_parameters") or {}
        full = {**(given.get(FULL) or {}), **(data.get("rope_scaling") or {})}
        windowed = given.get(WINDOWED) or {}
        if read_scaling(windowed, data) is not None:
            raise ValueError(f"config.json scales rotary speeds of {WINDOWED}; needed: rope_type='default'")
        base = windowed.get("rope_theta") or (data.get(local_key) if local_key else None) or local
        return {
            "rope_theta": float(full.get("rope_theta") or data.get("rope_theta") or theta),
            "rope_scaling": read_scaling(full, data),
            "window_rope_theta": float(base) if known["window"] else None,
        }

    def write(cfg: LLMConfig) -> Options:
        if cfg.rope_theta is None:
            raise ValueError("rope_theta=None; needed: a base of rotary positions")
        full = {**write_scaling(cfg.rope_scaling), "rope_theta": cfg.rope_theta}
        base = cfg.rope_theta if cfg.window_rope_theta is None else cfg.window_rope_theta
        windowed = {"rope_type": "default", "rope_theta": base}
        older = {local_key: base} if local_key else {}
        return {"rope_parameters": {FULL: full, WINDOWED: windowed}, **_older(full), **older}

    return Part(read, write)


def rope_or_none(key: str = "position_embedding_type") -> Part:
    """Rotary positions where `key` says so, else none, as in Granite 4 H."""
    turned = rope()

    def read(data: Data, known: Options) -> Options:
        return turned.read(data, known) if data.get(key) == "rope" else {"rope_theta": None}

    def write(cfg: LLMConfig) -> Options:
        return {key: "nope"} if cfg.rope_theta is None else {key: "rope", **turned.write(cfg)}

    return Part(read, write)


def _older(said: Options) -> Options:
    """The keys that readers before rope_parameters know, beside it."""
    out: Options = {"rope_theta": said["rope_theta"]}
    if "partial_rotary_factor" in said:
        out["partial_rotary_factor"] = said["partial_rotary_factor"]
    if said["rope_type"] != "default" or SECTIONS in said:
        out["rope_scaling"] = {key: value for key, value in said.items() if key != "rope_theta"}
    return out


def read_axes(given: Data) -> RopeAxes | None:
    """The axes in a rope_parameters or rope_scaling, None for one axis."""
    sections = given.get(SECTIONS)
    return None if sections is None else RopeAxes(tuple(sections), bool(given.get(INTERLEAVED, False)))


def write_axes(axes: RopeAxes) -> Options:
    """The keys of rope_parameters that read_axes() reads."""
    return {SECTIONS: list(axes.sections), **({INTERLEAVED: True} if axes.interleaved else {})}


def read_scaling(given: Data, data: Data, *, axes: bool = False) -> RopeScaling | None:
    """The scaling in a rope_parameters or rope_scaling, None for none; data: config.json around it.

    axes: whether the family may have positions of three axes. Raises ValueError for a kind that is not known.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    if not axes and (SECTIONS in given or kind == "mrope"):
        raise ValueError("config.json has positions of three axes (mrope_section); needed: those of text")
    if kind in ("default", "mrope"):
        return None
    kind = "longrope" if kind == "su" else kind
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        known = "default, linear, llama3, yarn, longrope"
        raise ValueError(f"config.json has rope_type={kind!r}; known: {known}")
    named = {our: given.get(theirs) for our, theirs in NAMES.items()}
    read: dict[str, Any] = {our: value for our, value in named.items() if value is not None} | {"kind": kind}
    longest = data.get("max_position_embeddings")
    if kind == "linear":
        read = {key: read[key] for key in ("kind", "factor") if key in read}
    else:
        outside = data.get("original_max_position_embeddings")
        read["original"] = outside or read.get("original") or longest
        if read["original"] is None:
            raise ValueError(f"config.json has rope_type={kind!r} without original_max_position_embeddings")
        if "factor" not in read and longest is not None:
            read["factor"] = longest / read["original"]
    if "factor" not in read:
        raise ValueError(f"config.json has rope_type={kind!r} without a factor")
    if kind == "yarn":
        _take_mscale(read, given)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read.items()}
    return RopeScaling(**values)


def _take_mscale(read: dict[str, Any], given: Data) -> None:
    """The factor on cosines and sines that two numbers of yarn say, where the file has them."""
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    if "attention_factor" in read or not (over and under):
        return
    grown = math.log(read["factor"]) if read["factor"] > 1 else 0.0
    read["attention_factor"] = (0.1 * over * grown + 1.0) / (0.1 * under * grown + 1.0)


def write_scaling(scaling: RopeScaling | None) -> Options:
    """rope_parameters but for its base."""
    if scaling is None:
        return {"rope_type": "default"}
    out = {}
    for f in fields(scaling):
        value = getattr(scaling, f.name)
        if value != f.default or (scaling.kind == "llama3" and f.name in ("low", "high")):
            out[NAMES[f.name]] = list(value) if isinstance(value, tuple) else value
    return out
