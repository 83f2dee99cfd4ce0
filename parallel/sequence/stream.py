"""Which tokens of a packed stream each context-parallel rank holds. Pure."""

from __future__ import annotations

import math
from typing import Literal

from parallel.sequence.intervals import Span

Order = Literal["contiguous", "zigzag"]


def piece_count(cp: int, order: Order) -> int:
    """Into how many equal pieces a stream is split; its length must be a multiple of this."""
    return 2 * cp if order == "zigzag" and cp > 1 else cp


def alignment(cp: int, shards: int, order: Order) -> int:
    """The alignment of a packed stream, in tokens: its length must be a multiple of this.

    Each of cp ranks then has an equal share, which splits further into `shards` equal shares over tp.
    """
    return math.lcm(piece_count(cp, order), cp * shards)


def context_spans(tokens: int, cp: int, order: Order) -> tuple[tuple[Span, ...], ...]:
    """Token ranges [start, stop) of each cp rank, in its local order.

    contiguous: one stretch a rank, so that a scan hands its state to one next rank. zigzag: pieces r and
    2 cp - 1 - r of 2 cp, so that causal attention costs every rank the same (Llama 3, arXiv 2407.21783,
    section 3.3.2).
    """
    pieces = piece_count(cp, order)
    assert tokens % pieces == 0, f"{tokens} tokens do not split into {pieces} pieces"
    n = tokens // pieces
    held = [(r, pieces - 1 - r) if pieces > cp else (r,) for r in range(cp)]
    return tuple(tuple((p * n, (p + 1) * n) for p in mine) for mine in held)
