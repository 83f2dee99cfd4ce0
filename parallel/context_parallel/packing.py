"""The documents of a packed stream that is split over context-parallel ranks, as one of the ranks sees them.

A rank holds a few pieces of the stream (parallel.sequence.stream). A document that crosses the edge of a
piece becomes fragments. Only the first fragment of a piece can continue a document, so layers exchange few,
long runs of rows, however many documents there are. Pure: every rank derives the rows of all ranks (law 4).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from parallel.comm.fetch import Fetch, make_fetch
from parallel.sequence.intervals import Span, numbers, size
from parallel.sequence.packed import Packing
from parallel.sequence.stream import Order, context_spans, piece_count
from parallel.topology.axis import Axis

T = TypeVar("T")


@dataclass(frozen=True)
class Continued:
    """The first fragment of a piece, where it continues a document of an earlier piece.

    rows: local rows [start, stop) of the fragment.
    before: stream rows [start, stop) of its document that precede the fragment.
    piece: index of the piece in the stream.
    fragment: index of the fragment among the rank's fragments.
    """

    rows: Span
    before: Span
    piece: int
    fragment: int


@dataclass(frozen=True)
class ContextPacking(Packing):
    """A Packing whose rows are split over cp. Make it with pack().

    `lengths` and `starts` describe the documents of the whole stream; `total`, `sequence_id` and `position`
    describe this rank's rows, which are in the order of the stream. `pairing` is refused, so no operation for
    whole documents can take a split stream by mistake.

    cp: the context-parallel axis.
    order: which pieces of the stream each rank holds.
    timeout_s: longest wait of a fetch(), in seconds.
    memo: what once() has made.
    """

    cp: Axis = field(default_factory=lambda: Axis.single("cp"))
    order: Order = "contiguous"
    timeout_s: float = 120.0
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def whole(self) -> int:
        """Rows of the whole stream."""
        return sum(self.lengths)

    @property
    def pieces(self) -> int:
        """Pieces of the stream, on all ranks."""
        return piece_count(self.cp.size, self.order)

    @property
    def piece_rows(self) -> int:
        """Rows of one piece."""
        return self.whole // self.pieces

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Rows [start, stop) of the stream that each cp rank holds."""
        return context_spans(self.whole, self.cp.size, self.order)

    @property
    def total(self) -> int:
        return size(self.spans[self.cp.rank])

    @cached_property
    def rows(self) -> np.ndarray:
        """The stream row of each row of this rank, int64 [T]."""
        return numbers(self.spans[self.cp.rank])

    @cached_property
    def sequence_id(self) -> Tensor:
        return self._tensor(self._document(self.rows))

    @cached_property
    def position(self) -> Tensor:
        return self._tensor(self.rows - self.starts[self._document(self.rows)])

    @property
    def pairing(self) -> Any:
        raise AssertionError("documents split over cp: use the operations of parallel.context_parallel")

    def _document(self, rows: np.ndarray) -> np.ndarray:
        # Where several documents start at one row, all but the last are empty.
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_before(self, row: int) -> int:
        """How many rows of this rank come before stream row `row`. Given n_real: its rows without padding."""
        return sum(min(max(row - start, 0), stop - start) for start, stop in self.spans[self.cp.rank])

    @cached_property
    def fragments(self) -> Packing:
        """This rank's rows as fragments: runs of one document within one piece, none empty."""
        lengths: list[int] = []
        for start, stop in self.spans[self.cp.rank]:
            inner = self.starts[(self.starts > start) & (self.starts < stop)]
            edges = np.unique(np.concatenate(([start, stop], inner)))
            lengths.extend(np.diff(edges).tolist())
        return Packing(tuple(n for n in lengths if n), self.device)

    def continued_of(self, rank: int) -> tuple[Continued, ...]:
        """The fragments of `rank` that continue a document, in local order; at most one for each piece."""
        return self.once(("continued", rank), lambda: self._continued_of(rank))

    def _continued_of(self, rank: int) -> tuple[Continued, ...]:
        out, at, seen = [], 0, 0
        for start, stop in self.spans[rank]:
            inner = int(np.unique(self.starts[(self.starts > start) & (self.starts < stop)]).size)
            if stop > start:
                document = int(self._document(np.asarray(start)))
                first, end = int(self.starts[document]), min(int(self.starts[document + 1]), stop)
                if first < start:
                    piece = start // self.piece_rows
                    out.append(Continued((at, at + end - start), (first, start), piece, seen))
                seen += inner + 1
            at += stop - start
        return tuple(out)

    @cached_property
    def continued(self) -> tuple[Continued, ...]:
        """The fragments of this rank that continue a document."""
        return self.continued_of(self.cp.rank)

    def fetch(self, name: str, wanted: Sequence[Sequence[Span]]) -> Fetch:
        """The exchange that brings rows of the stream to the cp ranks that want them.

        wanted[r]: disjoint ascending spans of the stream that rank r wants, its own rows or not. Every rank
            must pass the same.
        """
        return make_fetch(name, self.cp, self.spans, wanted, device=self.device, timeout_s=self.timeout_s)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), called once for each `key`: all layers share the plans that the first one makes."""
        if key not in self.memo:
            self.memo[key] = make()
        out: T = self.memo[key]
        return out


def pack(
    lengths: Sequence[int],
    device: torch.device | str,
    cp: Axis,
    order: Order = "contiguous",
    timeout_s: float = 120.0,
) -> Packing:
    """The packing of documents as a rank of `cp` sees it; a plain Packing where cp has one rank.

    lengths: rows of each document, the padding last. Raises ValueError where their sum is no multiple of
        piece_count(cp.size, order).
    order: which pieces each rank holds.
    timeout_s: longest wait for rows of other ranks, in seconds.
    """
    whole = Packing.of(lengths, device)
    if cp.size == 1:
        return whole
    pieces = piece_count(cp.size, order)
    if whole.total % pieces:
        raise ValueError(
            f"{whole.total} packed tokens do not split into {pieces} pieces for cp={cp.size} ({order}); "
            f"nearest: pad to {-(-whole.total // pieces) * pieces}"
        )
    return ContextPacking(whole.lengths, whole.device, cp=cp, order=order, timeout_s=timeout_s)
