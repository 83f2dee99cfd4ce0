"""A recurrence over a cut stream: each piece's state from those of the pieces before it.

A piece p that began with state h ends with keep_p h + s_p: the ranks exchange (s, log keep) of their pieces,
one small row a piece whatever its length, and each sums up what its own pieces begin with. Only the pieces of
a document that continues are sent. With zigzag order a rank simply has two pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch, lacking
from parallel.context_parallel.packing import ContextPacking
from parallel.sequence.intervals import Span, join, numbers


@dataclass(frozen=True)
class Pieces:
    """The exchange of piece states. local[i]: rows of this rank's piece i; fetch: None where no document
    continues; chains[i]: which of the fetched states piece i begins with, None where it begins a document."""

    local: tuple[slice, ...]
    fetch: Fetch | None
    chains: tuple[slice | None, ...]


def _chains_of(packing: ContextPacking, rank: int) -> dict[int, Span]:
    """For each piece of `rank` that continues a document, by number, the pieces that lead to it."""
    return {c.piece: (c.before[0] // packing.piece_rows, c.piece) for c in packing.continued_of(rank)}


def _stations(packing: ContextPacking) -> ContextPacking:
    """The pieces themselves as a stream of one row each, cut as the tokens are."""
    return replace(packing, lengths=(packing.pieces,), memo={})


def _wanted(packing: ContextPacking) -> list[list[Span]]:
    return [join(list(_chains_of(packing, r).values())) for r in range(packing.cp.size)]


def plan_pieces(packing: ContextPacking) -> Pieces:
    """Pure but for the group in packing.cp; alike on every rank."""
    n = packing.piece_rows
    mine = [start // n for start, _ in packing.spans[packing.cp.rank]] if n else []
    local = tuple(slice(i * n, (i + 1) * n) for i in range(len(mine)))
    wanted = _wanted(packing)
    if not any(wanted):
        return Pieces(local, None, tuple(None for _ in mine))
    fetch = _stations(packing).fetch("states of a recurrence", wanted)
    arrived = numbers(wanted[packing.cp.rank])
    chains = _chains_of(packing, packing.cp.rank)
    found: list[slice | None] = []
    for piece in mine:
        if piece in chains:
            low, high = np.searchsorted(arrived, chains[piece])
            found.append(slice(int(low), int(high)))
        else:
            found.append(None)
    return Pieces(local, fetch, tuple(found))


def states_taken(packing: ContextPacking) -> int:
    """How many piece states the worst-off rank receives. Pure."""
    return max(lacking(_stations(packing).spans, _wanted(packing)), default=0)


def begin_states(plan: Pieces, state: Tensor, log_keep: Tensor) -> list[Tensor | None]:
    """What each of this rank's pieces begins with; a collective over cp where any document continues.

    state [pieces, H, S]: each piece's last state had it begun with zero; log_keep [pieces, H]: logarithm of
    what a state before the piece keeps to its end, read only of pieces that lie in one document.
    Returns [H, S] per piece, or None for all where nothing continues on any rank.
    """
    if plan.fetch is None:
        return [None for _ in plan.local]
    got = plan.fetch(torch.cat([state, log_keep.unsqueeze(-1)], -1))
    states, falls = got[..., :-1], got[..., -1]
    out: list[Tensor | None] = []
    for chain in plan.chains:
        if chain is None:
            # Zero, but of the exchange: a rank that begins no piece with a state may still owe its own.
            out.append(states[:0].sum(0))
            continue
        # All of a chain but its first lie in the document, so what is left of a state is a product.
        later = torch.cat([falls[chain][1:], torch.zeros_like(falls[:1])]).flip(0).cumsum(0).flip(0)
        out.append(torch.einsum("qh,qhs->hs", later.exp(), states[chain]))
    return out
