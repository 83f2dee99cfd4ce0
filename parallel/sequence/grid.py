"""Positions of packed rows on three axes: text advances on all, a picture's rows lie in a grid. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

AXES = 3  # frames, rows, columns


class RowGrid(NamedTuple):
    """How the feature rows of an item lie: frame by frame, row by row."""

    frames: int
    down: int
    across: int
    step: float = 1.0
    """Positions from a frame to the next."""

    @property
    def rows(self) -> int:
        """Feature rows of the item."""
        return self.frames * self.down * self.across


Run = int | RowGrid
"""Tokens that follow each other on all axes, or the rows of an item."""


def grid_positions(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Positions of a document's rows in frames, rows and columns: [3, rows]. O(rows), a loop over runs alone.

    A run of tokens advances by one a token on all axes. An item begins on all axes where the run before it
    ended; the run after it begins as many positions later as its longer side has rows, whatever its frames
    (Qwen2.5-VL, arXiv 2502.13923, as transformers 5.23 numbers them).
    """
    parts, at = [np.zeros((AXES, 0), dtype=np.int64)], 0
    for run in runs:
        if isinstance(run, RowGrid):
            frames = (np.arange(run.frames) * run.step).astype(np.int64)
            every = np.meshgrid(frames, np.arange(run.down), np.arange(run.across), indexing="ij")
            place = np.stack(every).reshape(AXES, -1)
            parts.append(place + at)
            at += max(run.down, run.across)
        else:
            parts.append(np.broadcast_to(np.arange(at, at + run, dtype=np.int64), (AXES, run)))
            at += run
    return np.concatenate(parts, axis=1)
