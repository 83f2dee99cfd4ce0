"""Loads of even data, for many layouts: documents of one length, and items of one kind. No plan is made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llm.config import LLMConfig
from mm.plan.inputs import EncoderUse
from mm.predict.count.encoder import ItemLoad
from mm.predict.count.load import items_load
from mm.predict.count.packed import attended
from mm.predict.count.sizes import Degrees, TokenLoad
from parallel.topology.layout import Coord, Layout


@lru_cache(maxsize=1 << 12)
def even_tokens(
    cfg: LLMConfig, at: Degrees, documents: int, length: int, supervised: float = 1.0
) -> TokenLoad:
    """The load of a rank in a micro-batch, whose dp rank has so many documents of `length` tokens.

    supervised: share of tokens with a loss. Under cp each rank attends to an even share of the pairs.
    """
    tokens = -(-documents * length // (at.cp * at.tp)) * at.tp
    # Under cp a rank has documents, or parts of them that read what is before them.
    own = max(1, documents // at.cp)
    queries = max(1, tokens // own)
    bucket = attended([queries] * own, [queries] * own)
    if at.cp > documents:
        buckets = tuple(b._replace(keys=length) for b in bucket.buckets)
        bucket = bucket._replace(buckets=buckets)
    labels = int(supervised * tokens)
    return TokenLoad(
        tokens=tokens,
        routed=tokens // at.tp,
        documents=own,
        attended=bucket,
        supervised=(labels,) * (1 + cfg.mtp_layers),
    )


def even_items(use: EncoderUse, layout: Layout, meta: Mapping[str, int], count: int, module: str) -> ItemLoad:
    """The load of a rank in a micro-batch, whose dp rank has so many items of this metadata."""
    given: list[Any] = [meta] * count
    placed = EncoderUse(use.cls, use.cfg, layout, use.deal, use.at_once, use.resample)
    return items_load(placed, given, Coord(0, 0, 0, 0), module)
