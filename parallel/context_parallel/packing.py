"""Documents of a packed stream that is cut over context-parallel ranks, as one of the ranks sees them.

A rank holds a few pieces of the stream (parallel.sequence.stream). A document that lies across a piece's edge
becomes fragments; at most one fragment of a piece, its first, continues a document, so that whatever a layer
exchanges between ranks concerns few, long runs of rows, however many documents there are. Pure: every rank
derives every rank's share.
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

    rows: local rows [start, stop) of the fragment; before: global rows [start, stop) of the document up to
    the fragment; piece: index of the piece in the stream; fragment: index among the rank's fragments.
    """

    rows: Span
    before: Span
    piece: int
    fragment: int


@dataclass(frozen=True)
class ContextPacking(Packing):
    """A Packing whose rows are cut over cp. Make it with pack().

    lengths and starts are those of the whole stream's documents; total, sequence_id and position are those
    of this rank's rows. The rows of a rank are in the order of the stream. `pairing` is refused, so that no
    operation for whole documents can take a cut stream by mistake. timeout_s bounds the waits of fetch().
    """

    cp: Axis = field(default_factory=lambda: Axis.single("cp"))
    order: Order = "contiguous"
    timeout_s: float = 120.0
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def whole(self) -> int:
        """Rows of the stream, of all ranks."""
        return sum(self.lengths)

    @property
    def pieces(self) -> int:
        return piece_count(self.cp.size, self.order)

    @property
    def piece_rows(self) -> int:
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
        """Place in the stream of each row of this rank, int64 [T]."""
        return numbers(self.spans[self.cp.rank])

    @cached_property
    def sequence_id(self) -> Tensor:
        return self._tensor(self._document(self.rows))

    @cached_property
    def position(self) -> Tensor:
        return self._tensor(self.rows - self.starts[self._document(self.rows)])

    @property
    def pairing(self) -> Any:
        raise AssertionError("documents cut over cp: use the operations of parallel.context_parallel")

    def _document(self, rows: np.ndarray) -> np.ndarray:
        # Of documents that start at one row all but the last are empty.
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_before(self, row: int) -> int:
        """How many rows of this rank come before `row` of the stream (its real ones, given n_real)."""
        return sum(min(max(row - start, 0), stop - start) for start, stop in self.spans[self.cp.rank])

    @cached_property
    def fragments(self) -> Packing:
        """This rank's rows as runs of one document within one piece, none empty."""
        lengths: list[int] = []
        for start, stop in self.spans[self.cp.rank]:
            inner = self.starts[(self.starts > start) & (self.starts < stop)]
            edges = np.unique(np.concatenate(([start, stop], inner)))
            lengths.extend(np.diff(edges).tolist())
        return Packing(tuple(n for n in lengths if n), self.device)

    def continued_of(self, rank: int) -> tuple[Continued, ...]:
        """The fragments of `rank` that continue a document, in its local order (at most one a piece)."""
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
        return self.continued_of(self.cp.rank)

    def fetch(self, name: str, wanted: Sequence[Sequence[Span]]) -> Fetch:
        """Rows that cp ranks want of those that they hold; wanted[r]: disjoint ascending stretches of the
        stream, rank r's own among them or not, alike on every rank."""
        return make_fetch(name, self.cp, self.spans, wanted, device=self.device, timeout_s=self.timeout_s)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), kept under `key`: plans and indices are made for the first layer and shared by all."""
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
    """The packing of documents of these lengths, the padding last, as a rank of `cp` sees it.

    A plain Packing where cp has one rank. The sum of the lengths must be a multiple of the pieces (see
    piece_count()); ValueError otherwise. timeout_s: the longest wait for rows of others.
    """
    whole = Packing.of(lengths, device)
    if cp.size == 1:
        return whole
    pieces = piece_count(cp.size, order)
    if whole.total % pieces:
        raise ValueError(
            f"{whole.total} packed tokens do not cut into {pieces} pieces for cp={cp.size} ({order}); "
            f"nearest: pad to {-(-whole.total // pieces) * pieces}"
        )
    return ContextPacking(whole.lengths, whole.device, cp, order, timeout_s)
