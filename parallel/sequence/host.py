"""Values of the host brought to a device: the one way from host memory that hot paths take.

A copy from pageable memory may make the host wait until the device has done all that it was given before
(torch's `Tensor.to` with non_blocking, whose source is not pinned). tests/test_sources.py finds other ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parallel.sequence.intervals import Column, Rows, join_rows


def to_device(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """The values on `device`, for which the host does not wait.

    values: of the host, any shape. Where `device` is the host too the result shares their memory, so write
    to neither; elsewhere they are copied at once to pinned memory, which torch's allocator keeps until the
    copy has ended and then uses again.
    """
    host = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    kind = torch.device(device).type
    if kind == "cpu":
        return host
    return (host if kind == "meta" else host.pin_memory()).to(device, non_blocking=True)


class Indices:
    """Numbers of rows on a device, to index tensors there; each array is copied at its first use and kept.

    A plan that several layers carry out keeps one of these. Arrays are known by identity, and must not
    change.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.device], tuple[Column, Tensor]] = {}
        self._joined: dict[tuple[object, ...], tuple[Sequence[Rows], Rows]] = {}

    def on(self, rows: Column, device: torch.device) -> Tensor:
        """The numbers on `device`, int64."""
        key = id(rows), device
        if key not in self._kept:
            self._kept[key] = rows, to_device(rows, device)
        return self._kept[key][1]

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one part after another; one array however often the same parts are given."""
        key = tuple((p.start, p.stop) if isinstance(p, slice) else id(p) for p in parts)
        if key not in self._joined:
            self._joined[key] = parts, join_rows(parts)
        return self._joined[key][1]
