"""Rotary positions: how fast each pair of features turns, with the published ways to reach longer contexts.

Pure: numbers for llm.attention, worked out in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
AXES = 3  # of RopeAxes: frames, rows, columns


@dataclass(frozen=True)
class RopeScaling:
    """A change of rotary speeds for contexts longer than those of training.

    A field in [brackets] is the key of rope_scaling (or rope_parameters) in published config.json files.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    """linear: positions divided by factor (arXiv 2306.15595). llama3: slow pairs alone are (arXiv 2407.21783,
    with the published model's interpolation between). yarn: arXiv 2309.00071, section 3.2. longrope: a factor
    of its own for each pair (arXiv 2402.13753). [rope_type, or type]"""
    factor: float
    """The longer context over that of training. Of longrope it enters attention_factor alone. [factor]"""
    original: int | None = None
    """Tokens of context in training; all kinds but linear need it. [original_max_position_embeddings]"""
    low: float = 1.0
    """llama3: pairs that turn less often than this within `original` tokens are divided. [low_freq_factor]"""
    high: float = 4.0
    """llama3: pairs that turn more often than this stay as they are. [high_freq_factor]"""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within `original` tokens stay as they are. [beta_fast]"""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this are divided by factor. [beta_slow]"""
    truncate: bool = True
    """yarn: whether the two bounds between which pairs are mixed are whole pairs. [truncate]"""
    attention_factor: float | None = None
    """yarn, longrope: factor on cosines and sines. None: 0.1 ln(factor) + 1 for yarn,
    sqrt(1 + ln(factor) / ln(original)) for longrope, 1 for a factor up to 1. [attention_factor]"""
    short: tuple[float, ...] = ()
    """longrope: by which each pair's speed is divided in documents of up to `original` tokens.
    [short_factor]"""
    long: tuple[float, ...] = ()
    """longrope: the same in longer documents. [long_factor]"""


@dataclass(frozen=True)
class RopeAxes:
    """Rotary positions on three axes: the frame, the row and the column of a picture's row (M-RoPE, Qwen2-VL,
    arXiv 2409.12191, section 2.1). Text has the same position on all three.

    A field in [brackets] is the key of rope_scaling (or rope_parameters) in published config.json files.
    """

    sections: tuple[int, ...]
    """Rotated pairs of features that turn by each axis. [mrope_section]"""
    interleaved: bool = False
    """Whether pairs take turns, frame, row, column, for as long as sections of row and column last, the rest
    being of frames (Qwen3-VL, arXiv 2511.21631); else each axis has its pairs one after another.
    [mrope_interleaved]"""


def check_axes(axes: RopeAxes, pairs: int) -> None:
    """Raise ValueError for sections that are not of three axes and `pairs` pairs."""
    if len(axes.sections) != AXES or min(axes.sections) < 0 or sum(axes.sections) != pairs:
        raise ValueError(
            f"model.llm.rope_axes.sections are {list(axes.sections)}; needed: three numbers, of frames, rows "
            f"and columns, whose sum is the {pairs} rotated pairs of a head"
        )


def axis_of_pairs(axes: RopeAxes) -> NDArray[np.int64]:
    """By rotated pair, the axis whose position it turns by: int64 [pairs]."""
    if not axes.interleaved:
        return np.repeat(np.arange(AXES), axes.sections)
    out = np.zeros(sum(axes.sections), dtype=np.int64)
    for axis in (1, 2):
        out[axis : AXES * axes.sections[axis] : AXES] = axis
    return out


# The fields that each kind reads besides kind and factor.
_READ = {
    "linear": (),
    "llama3": ("original", "low", "high"),
    "yarn": ("original", "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": ("original", "attention_factor", "short", "long"),
}


def check_scaling(scaling: RopeScaling, pairs: int) -> None:
    """Raise ValueError for numbers that are impossible or not of this kind; pairs: rotated ones of a head."""
    what = "model.llm.rope_scaling"
    if scaling.kind not in _READ:
        raise ValueError(f"{what}.kind is {scaling.kind!r}; known: {', '.join(_READ)}")
    read = _READ[scaling.kind]
    for f in fields(scaling):
        value = getattr(scaling, f.name)
        if f.name not in ("kind", "factor", *read) and value != f.default:
            known = ", ".join(("factor", *read))
            raise ValueError(f"{what}.{f.name}={value} is not of kind={scaling.kind}, which has {known}")
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{what}.{f.name} is {value}; needed: more than 0")
    if "original" in read and scaling.original is None:
        raise ValueError(
            f"{what}.kind={scaling.kind} needs original, the tokens of context in training, as 8192"
        )
    for least, most in (("low", "high"), ("beta_slow", "beta_fast")):
        if (a := getattr(scaling, least)) >= (b := getattr(scaling, most)):
            raise ValueError(f"{what}.{least}={a} with {most}={b}; needed: {least} below {most}")
    if scaling.kind == "longrope":
        for name, factors in (("short", scaling.short), ("long", scaling.long)):
            if len(factors) != pairs or min(factors) <= 0:
                raise ValueError(
                    f"{what}.{name} has {len(factors)} factors; needed: one more than 0 for each of the "
                    f"{pairs} rotated pairs of a head"
                )


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor on cosines and sines."""
    if scaling is None or scaling.kind in ("linear", "llama3"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    assert scaling.original is not None
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.original))


def speeds(theta: float, pairs: int, scaling: RopeScaling | None) -> Floats:
    """Radians a token of each pair of features, [1, pairs]; of longrope [2, pairs]: of documents of up to
    `original` tokens, and of longer ones."""
    base = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if scaling is None:
        return base[None]
    if scaling.kind == "linear":
        return base[None] / scaling.factor
    assert scaling.original is not None
    if scaling.kind == "longrope":
        return base / np.asarray([scaling.short, scaling.long], dtype=np.float64)
    if scaling.kind == "llama3":
        turns = scaling.original * base / (2 * math.pi)  # within the context of training
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    else:
        kept = _yarn_kept(theta, pairs, scaling)
    return (base * (kept + (1.0 - kept) / scaling.factor))[None]


def _yarn_kept(theta: float, pairs: int, scaling: RopeScaling) -> Floats:
    """How much of each pair's speed stays, [pairs]: 1 for fast pairs, 0 for slow ones, a line between."""
    original = scaling.original
    assert original is not None

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often within the context of training."""
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The published code bounds the last by the features, not the pairs, less one.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    # Bounds that coincide make a step.
    ramp = (np.arange(pairs) - first) / (last - first if last != first else 0.001)
    return np.asarray(1.0 - np.clip(ramp, 0.0, 1.0), dtype=np.float64)
