"""How many tokens each rank routes, from the layout and the lengths of the streams. Pure.

Ranks that share experts need each other's numbers to size what they exchange. A plan knows them, so that
nobody has to ask (law 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parallel.expert_parallel.routing import Table
from parallel.sequence.stream import Order, context_spans, piece_count
from parallel.topology.layout import Layout


def routed_tokens(
    layout: Layout, rank: int, tokens: Sequence[int], real: Sequence[int], order: Order = "contiguous"
) -> Table:
    """Tokens that each rank routes in a layer, of those that share experts with `rank`.

    tokens, real: by dp rank, the length of its packed stream, and of that without the padding at its end.
    order: which tokens of a stream each cp rank holds. Its share is split over tp, padding or not, and each
    rank routes the real tokens of its part. O(ep etp), whatever the number of ranks.
    """
    tp, cp, group = layout.tp, layout.cp, layout.ep * layout.etp
    # Both views number the ranks of a stage alike, and etp and ep are fastest in theirs.
    mine = layout.ranks.index(rank) % (layout.size // layout.pp)
    at = mine // group * group + np.arange(group)
    dp = at // (tp * cp)
    length, end = np.asarray(tokens, np.int64)[dp], np.asarray(real, np.int64)[dp]
    pieces = piece_count(cp, order)
    spans = np.asarray(context_spans(pieces, cp, order))[at // tp % cp]  # [group, pieces of a rank, 2]
    spans = spans * (length // pieces)[:, None, None]
    before_padding = (np.minimum(spans[..., 1], end[:, None]) - spans[..., 0]).clip(min=0).sum(1)
    width = length // (cp * tp)
    routed = (before_padding - at % tp * width).clip(0, width)
    out: list[list[int]] = routed.reshape(layout.ep, layout.etp).T.tolist()
    return out
