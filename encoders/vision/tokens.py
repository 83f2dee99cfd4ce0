"""Where each token of packed pictures lies: its item, its frame, its row and column in patches. Pure.

A picture's tokens are its prefix (class tokens and registers), then its patches, frame by frame. The patches
of a frame come square by square of merge x merge patches, the squares row by row, so that those of one
feature row follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from encoders.share import Share, pieces
from parallel.sequence.intervals import Column, Span, before


class Grid(NamedTuple):
    """Patches of a picture or of a video."""

    frames: int
    down: int
    across: int

    @property
    def patches(self) -> int:
        """All patches."""
        return self.frames * self.down * self.across


@dataclass(frozen=True)
class Places:
    """Tokens one after another; columns of int64 [tokens].

    item: which item each is of.
    prefix: its number among the item's prefix tokens; -1 for a patch.
    frame, row, column: of a patch, in patches; 0 for a prefix token.
    down, across: patches of the item's frames.
    """

    item: Column
    prefix: Column
    frame: Column
    row: Column
    column: Column
    down: Column
    across: Column


def places(grids: Sequence[Grid], share: Share, span: Span, *, prefix: int, merge: int) -> Places:
    """The places of the tokens in `span`. grids: of all items. O(tokens in the span)."""
    own = pieces(share.lengths, span)
    length = np.asarray([p.stop - p.start for p in own], dtype=np.int64)
    item = np.repeat(np.asarray([p.item for p in own], dtype=np.int64), length)
    start = np.repeat(np.asarray([p.start for p in own], dtype=np.int64) - before(length), length)
    at = np.arange(int(length.sum())) + start - prefix  # among the item's patches; negative in the prefix
    sizes = np.asarray([(g.down, g.across) for g in grids], dtype=np.int64).reshape(-1, 2)[item]
    down, across = sizes[:, 0], sizes[:, 1]
    patch = np.maximum(at, 0)
    frame, within = np.divmod(patch, down * across)
    square, corner = np.divmod(within, merge**2)
    row = merge * (square // (across // merge)) + corner // merge
    column = merge * (square % (across // merge)) + corner % merge
    return Places(item, np.where(at < 0, at + prefix, -1), frame, row, column, down=down, across=across)


def frame_lengths(grids: Sequence[Grid], prefix: int) -> tuple[int, ...]:
    """Tokens of each frame of each item: attention does not cross frames. A prefix is of the first frame."""
    out: list[int] = []
    for g in grids:
        out += [prefix * (f == 0) + g.down * g.across for f in range(g.frames)]
    return tuple(out)


def window_numbers(at: Places, window: int) -> Column:
    """A number for each token, the same for the tokens of one window of window x window patches of one frame
    and for no others."""
    across = -(-at.across // window)
    most = int((-(-at.down // window) * across).max(initial=1))
    in_frame = at.row // window * across + at.column // window
    frames = int(at.frame.max(initial=0)) + 1
    return (at.item * frames + at.frame) * most + in_frame


def window_order(grid: Grid, window: int, merge: int) -> Column:
    """Numbers of a picture's merged rows, window by window, the windows row by row: int64 [rows]."""
    share = Share(
        (grid.patches,), ((0, grid.patches),), (0, grid.patches), ((0, grid.patches),), (0, grid.patches)
    )
    at = places([grid], share, share.own, prefix=0, merge=merge)
    rows: Column = np.argsort(window_numbers(at, window)[:: merge**2], kind="stable")
    return rows


def patches_before(grids: Sequence[Grid], share: Share, token: int, prefix: int) -> int:
    """How many of the tokens before number `token` are patches. grids: of all items."""
    whole = 0
    for length, grid in zip(share.lengths, grids, strict=True):
        if token < length:
            return whole + max(0, token - prefix)
        token, whole = token - length, whole + grid.patches
    return whole


def table_rows(at: Places, first: Sequence[int]) -> Column:
    """The rows of the patches among `at` in tables of positions, row by row. first: by item, of its table."""
    patch = at.prefix < 0
    item = at.item[patch]
    rows: Column = (
        np.asarray(first, dtype=np.int64)[item] + at.row[patch] * at.across[patch] + at.column[patch]
    )
    return rows


def token_rows(at: Places, prefix: int) -> Column:
    """For each token its row among the prefix tokens and, after them, the patches among `at`."""
    patch = at.prefix < 0
    rows: Column = np.where(patch, prefix + np.cumsum(patch) - 1, at.prefix)
    return rows
