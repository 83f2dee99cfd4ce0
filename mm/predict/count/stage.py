"""A stage of a module as its parts one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from encoders.fastconformer import FastConformer
from encoders.vit import ViT
from llm.config import LLMConfig
from mm.plan.inputs import EncoderUse
from mm.predict.count.encoder import (
    Ends,
    ItemLoad,
    block_counts,
    end_counts,
    foreign_counts,
    stem_counts,
)
from mm.predict.count.layers import first_counts, last_counts, layer_counts, like
from mm.predict.count.pieces import How, Piece, chain, keeping
from mm.predict.count.sizes import Degrees, TokenLoad
from mm.predict.count.vision import (
    is_written,
    rotary_bytes,
    vision_block,
    vision_ends,
    vision_stem,
)
from parallel.topology.stage import Stage


def llm_stage(
    cfg: LLMConfig, stage: Stage, at: Degrees, load: TokenLoad, how: How, rows: tuple[int, ...] = ()
) -> Piece:
    """A stage of the language model in a micro-batch. rows: of each encoder, that enter at its embedding."""
    return chain(llm_parts(cfg, stage, at, load, how, rows))


def llm_parts(
    cfg: LLMConfig, stage: Stage, at: Degrees, load: TokenLoad, how: How, rows: tuple[int, ...] = ()
) -> list[Piece]:
    """The parts of llm_stage()."""
    here, at = at, at._replace(ep_rank=None)
    parts = [first_counts(cfg, at, load.tokens, rows, how)] if stage.first else []
    below = how
    for i in stage.layers:
        symbol = cfg.symbols[i]
        own = like(cfg, i) if symbol == "*" else None
        parts.append(layer_counts(cfg, symbol, own, here if symbol == "E" else at, load, below))
        below = how if how.low is None else how._replace(below=True)
    if stage.last:
        parts.append(last_counts(cfg, here if cfg.mtp_layers else at, load, below))
    return parts


class Frozen(NamedTuple):
    """What of an encoder is not trained: its first layers, all of it, its projector."""

    layers: int = 0
    encoder: bool = False
    projector: bool = False


class Outer(NamedTuple):
    """The projectors of an encoder: hidden and output width, and what they compute."""

    hidden: int
    d_out: int
    kind: Any


def encoder_stage(
    use: EncoderUse, stage: Stage, at: Degrees, load: ItemLoad, how: How, *, frozen: Frozen, outer: Outer
) -> Piece:
    """A stage of an encoder's module in a micro-batch."""
    return chain(encoder_parts(use, stage, at, load, how, frozen=frozen, outer=outer))


def encoder_parts(
    use: EncoderUse, stage: Stage, at: Degrees, load: ItemLoad, how: How, *, frozen: Frozen, outer: Outer
) -> list[Piece]:
    """The parts of encoder_stage()."""
    cls, cfg = use.cls, use.cfg
    inner = at if cls.tensor_parallel else Degrees(at.module, cp=at.cp, cp_rank=at.cp_rank)
    trains = not frozen.encoder
    written = is_written(use)
    shared = float(load.attended.indices) + (rotary_bytes(cfg, load) if written else 0.0)
    parts: list[Piece] = [keeping(shared)] if trains else []
    reached = False
    if cls in (ViT, FastConformer) or written:
        whole = trains and how.low is None  # not adapters alone
        early = whole and not frozen.layers
        if stage.first:
            stem = vision_stem if written else stem_counts
            parts.append(stem(cfg, load, how._replace(trains=early)))
            reached = early or how.low is not None
        else:
            reached = trains and (how.low is not None or frozen.layers < stage.start)
        for i in stage.layers:
            learns = whole and i >= frozen.layers
            block = vision_block if written else block_counts
            parts.append(block(cfg, inner, load, how._replace(trains=learns, below=reached)))
            reached = reached or learns or how.low is not None
    else:
        parts += _foreign(use, stage, load, how._replace(trains=trains, below=False))
        reached = trains
    if stage.last:
        ends = how._replace(trains=trains and how.low is None, below=reached)
        parts.append(_ends(use, inner, load, ends, (frozen, outer)))
    return parts


def _ends(use: EncoderUse, at: Degrees, load: ItemLoad, how: How, given: tuple[Frozen, Outer]) -> Piece:
    frozen, outer = given
    cls, cfg = use.cls, use.cfg
    unit = cls.tokens_per_row(cfg)
    rows = load.kept // unit if not cls.prefix_tokens(cfg) else load.rows
    norm = cfg.width if cls is ViT else 0
    levels = cls.feature_levels(cfg)
    ends = Ends(
        width=cls.feature_width(cfg),
        rows=rows,
        hidden=outer.hidden,
        d_out=outer.d_out,
        kind=outer.kind,
        norm=norm,
        tokens=load.kept if norm else rows,
        levels=levels,
        trains=not frozen.projector,
    )
    if is_written(use):
        return vision_ends(cfg, ends._replace(tokens=load.kept), at, how)
    return end_counts(ends, at, how)


def _foreign(use: EncoderUse, stage: Stage, load: ItemLoad, how: How) -> Sequence[Piece]:
    """Layers of an encoder that is written elsewhere, alike."""
    cls, cfg = use.cls, use.cfg
    layers = max(1, len(stage.layers))
    width = float(cls.feature_width(cfg))
    flops = load.flops / max(1, cls.layer_count(cfg))
    kept = 34.0 * load.kept * width  # of a transformer's layer (arXiv 2205.05198, equation 2), without scores
    one = foreign_counts(flops, (kept, width, float(load.kept), 0.0), how)
    return [one] * layers
