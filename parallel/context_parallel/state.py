"""A linear recurrence over a split stream: the initial state of each piece, from the pieces before it.

A piece p with initial state h ends in the state keep_p h + s_p. The ranks exchange (s, log keep) of their
pieces, one small row for each piece whatever its length, and each rank computes the initial states of its own
pieces. Only pieces of a document that continues are sent. With zigzag order a rank has two pieces.
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
    """The exchange of piece states.

    local: local rows of each of this rank's pieces.
    fetch: None where no document continues on any rank.
    chains: for each piece, the fetched states that make up its initial state; None where a document begins
        with the piece.
    """

    local: tuple[slice, ...]
    fetch: Fetch | None
    chains: tuple[slice | None, ...]


def _chains_of(packing: ContextPacking, rank: int) -> dict[int, Span]:
    """By index, each piece of `rank` that continues a document, with the pieces that its state comes from."""
    return {c.piece: (c.before[0] // packing.piece_rows, c.piece) for c in packing.continued_of(rank)}


def piece_stream(packing: ContextPacking) -> ContextPacking:
    """A stream of one row for each piece, split over cp as the tokens are."""
    return replace(packing, lengths=(packing.pieces,), memo={})


def wanted_pieces(packing: ContextPacking) -> list[list[Span]]:
    """By cp rank, the pieces whose last states its own begin with. Pure."""
    return [join(list(_chains_of(packing, r).values())) for r in range(packing.cp.size)]


def plan_pieces(packing: ContextPacking) -> Pieces:
    """The exchange of piece states for one packing. Every rank derives its part, without communication."""
    n = packing.piece_rows
    mine = [start // n for start, _ in packing.spans[packing.cp.rank]] if n else []
    local = tuple(slice(i * n, (i + 1) * n) for i in range(len(mine)))
    wanted = wanted_pieces(packing)
    if not any(wanted):
        return Pieces(local, None, tuple(None for _ in mine))
    fetch = piece_stream(packing).fetch("states of a recurrence", wanted)
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
    """Piece states received, on the rank that receives most. Pure."""
    return max(lacking(piece_stream(packing).spans, wanted_pieces(packing)), default=0)


def begin_states(plan: Pieces, state: Tensor, log_keep: Tensor) -> list[Tensor | None]:
    """The initial state of each of this rank's pieces; a collective over cp where any document continues.

    state: [pieces, H, S], the last state of each piece for an initial state of zero.
    log_keep: [pieces, H], logarithm of the factor by which the piece scales its initial state; used only for
        pieces that lie within one document.
    Returns [H, S] for each piece, or None for all pieces where no document continues on any rank.
    """
    if plan.fetch is None:
        return [None for _ in plan.local]
    fetched = plan.fetch(torch.cat([state, log_keep.unsqueeze(-1)], -1))
    states, log_keeps = fetched[..., :-1], fetched[..., -1]
    out: list[Tensor | None] = []
    for chain in plan.chains:
        if chain is None:
            # Zero, yet part of the graph: a rank that needs no state may still owe others its own.
            out.append(states[:0].sum(0))
            continue
        # Every piece of a chain after its first lies within the document, so the factors multiply.
        later = torch.cat([log_keeps[chain][1:], torch.zeros_like(log_keeps[:1])]).flip(0).cumsum(0).flip(0)
        out.append(torch.einsum("qh,qhs->hs", later.exp(), states[chain]))
    return out
