"""Heads that share something (a key/value head, a scan group), cut over tensor-parallel ranks.

Where tp has no more ranks than there are shared heads, those are cut like the rest. Where it has more, every
rank keeps all of their weights and uses the few that its own heads read; as each rank's gradient then is a
part of the whole, their parameters are declared partial. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.sharding.param import Init, ParamSpec


@dataclass(frozen=True)
class SharedHeads:
    """What one tp rank uses of `shared` heads, which `heads` heads read in equal runs.

    sharded: whether tp shards their weights; first, count: the stretch of all shared heads that this rank
    uses; own: heads of this rank; offset, run: own head i reads head (offset + i) // run of the stretch.
    """

    sharded: bool
    first: int
    count: int
    own: int
    offset: int
    run: int

    @property
    def even(self) -> bool:
        """Whether the own heads read the stretch in equal runs, as grouped kernels expect."""
        return self.count == 1 or (self.offset == 0 and self.own == self.count * self.run)

    def spec(self, init: Init) -> ParamSpec:
        """The spec of a parameter whose dim 0 runs over the shared heads."""
        return ParamSpec(init, shard_dim=0) if self.sharded else ParamSpec(init, partial=True)

    def used(self, held: Tensor, width: int) -> Tensor:
        """Rows of the heads that this rank uses, of a weight [shared heads held * width, ..]."""
        return held if self.sharded else held.narrow(0, self.first * width, self.count * width)

    def reads(self, device: torch.device) -> Tensor:
        """Which head of the stretch each own head reads, int64 [own]."""
        return (torch.arange(self.own, device=device) + self.offset) // self.run

    def spread(self, x: Tensor) -> Tensor:
        """[T, count, D] to heads that are read in equal runs: x itself where they are already."""
        return x if self.even else x.index_select(1, self.reads(x.device))


def share_heads(heads: int, shared: int, ranks: int, rank: int) -> SharedHeads:
    """Which of `shared` heads the heads of one of the ranks read; both shared and ranks divide heads."""
    assert heads % shared == 0 and heads % ranks == 0, (heads, shared, ranks)
    own, run = heads // ranks, heads // shared
    first, offset = divmod(rank * own, run)
    count = (offset + own - 1) // run + 1
    return SharedHeads(shared % ranks == 0, first, count, own, offset, run)
