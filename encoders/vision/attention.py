"""Attention of a rank's tokens within frames of pictures, or within windows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.context import ItemAttention
from encoders.share import Share
from encoders.vision.tokens import Grid, frame_lengths, places, window_numbers
from parallel.comm.fetch import Fetch, make_fetch
from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.host import to_device
from parallel.sequence.intervals import Span
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class WindowAttention:
    """Attention of a rank's tokens to the tokens of their windows, whichever cp rank has these.

    fetch: brings the keys and values of all windows that the rank has tokens of.
    queries, keys: int64, the tokens and the fetched ones, window by window; back: the tokens' places then.
    pairing: which keys each query attends to.
    """

    fetch: Fetch
    queries: Tensor
    keys: Tensor
    back: Tensor
    pairing: Pairing

    def __call__(self, q: Tensor, kv: Tensor) -> Tensor:
        """q [T, H, D] and kv [T, 2, H, D] of this rank's T tokens to [T, H, D]. A collective over cp."""
        k, v = self.fetch(kv).index_select(0, self.keys).unbind(1)
        y = attend(q.index_select(0, self.queries), k, v, self.pairing)
        return y.index_select(0, self.back)


def frame_attention(
    grids: Sequence[Grid], share: Share, axis: Axis, *, prefix: int, device: torch.device, timeout_s: float
) -> ItemAttention:
    """Attention within each frame of each item; axis: cp."""
    framed = replace(share, lengths=frame_lengths(grids, prefix))
    return ItemAttention.of(framed, axis, device, timeout_s)


def window_attention(
    grids: Sequence[Grid],
    share: Share,
    axis: Axis,
    *,
    shape: tuple[int, int],
    device: torch.device,
    timeout_s: float,
) -> WindowAttention:
    """Attention within windows; axis: cp. shape: sides of a window and of a merged square, in patches.

    Every rank of cp works out what each of them needs: O(tokens of the dp rank) on the host, once a batch.
    """
    window, merge = shape
    every = places(grids, share, (0, sum(share.lengths)), prefix=0, merge=merge)
    number = window_numbers(every, window)
    wanted = [_runs(np.isin(number, number[a:b])) for a, b in share.spans]
    fetch = make_fetch(
        "keys of an encoder's windows",
        axis,
        [[span] for span in share.spans],
        wanted,
        device=device,
        timeout_s=timeout_s,
    )
    own = number[slice(*share.own)]
    seen = np.concatenate([number[a:b] for a, b in wanted[axis.rank]] or [own])
    order = np.argsort(own, kind="stable")
    queries = np.unique(own, return_counts=True)[1]
    keys = np.unique(seen, return_counts=True)[1]
    return WindowAttention(
        fetch,
        queries=to_device(order, device),
        keys=to_device(np.argsort(seen, kind="stable"), device),
        back=to_device(np.argsort(order), device),
        pairing=Pairing.of(queries.tolist(), keys.tolist(), device),
    )


def _runs(which: NDArray[np.bool_]) -> list[Span]:
    """The stretches of a column of truth values that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], which.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
