"""Counts payload at torch.distributed's doors."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Counter:
    """Bytes that this rank hands to point-to-point sends and to all-to-all over the default group, and how
    many of them are for ranks of other nodes of `node_size`."""

    def __init__(self, node_size: int = 1) -> None:
        self.bytes = self.crossing = 0
        self.node_size = node_size

    def __enter__(self) -> Counter:
        self.batch, self.exchange = dist.batch_isend_irecv, dist.all_to_all_single

        def batch(ops: list[Any]) -> Any:
            for op in ops:
                if op.op is dist.isend:
                    self._count(op.tensor.shape[0], op.tensor, op.peer)
            return self.batch(ops)

        def exchange(out: Tensor, into: Tensor, to: list[int], of: list[int], **kw: Any) -> Any:
            for peer, rows in enumerate(of):
                self._count(rows, into, peer)
            return self.exchange(out, into, to, of, **kw)

        dist.batch_isend_irecv, dist.all_to_all_single = batch, exchange
        return self

    def _count(self, rows: int, of: Tensor, peer: int) -> None:
        size = rows * of.shape[1:].numel() * of.element_size()
        self.bytes += size
        if peer // self.node_size != dist.get_rank() // self.node_size:
            self.crossing += size

    def __exit__(self, *error: object) -> None:
        dist.batch_isend_irecv, dist.all_to_all_single = self.batch, self.exchange
