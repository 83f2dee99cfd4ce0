"""Heads that share another (a key/value head in attention, a group in a scan), sharded over tp.

Where tp divides the number of shared heads, the shared heads are sharded like the others. Otherwise every
rank keeps the weights of all shared heads and uses the few that its own heads read. The gradient of a rank is
then a part of the whole, so these parameters are declared partial. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.sharding.param import Init, ParamSpec


@dataclass(frozen=True)
class SharedHeads:
    """The shared heads that one tp rank uses. Consecutive runs of heads read one shared head each.

    sharded: whether tp shards the weights of the shared heads.
    first, count: this rank uses the shared heads first .. first + count - 1.
    own: heads of this rank.
    offset, run: own head i reads the shared head first + (offset + i) // run.
    """

    sharded: bool
    first: int
    count: int
    own: int
    offset: int
    run: int

    @property
    def even(self) -> bool:
        """Whether the own heads read the used shared heads in equal runs, as grouped kernels expect."""
        return self.count == 1 or (self.offset == 0 and self.own == self.count * self.run)

    @property
    def copies(self) -> int:
        """How many of the used heads, the first of them, an earlier rank uses too: one or none."""
        return int(self.offset > 0)

    def spec(self, init: Init) -> ParamSpec:
        """The ParamSpec of a parameter whose dim 0 runs over the shared heads."""
        return ParamSpec(init, shard_dim=0) if self.sharded else ParamSpec(init, partial=True)

    def used(self, held: Tensor, width: int) -> Tensor:
        """The rows that this rank uses of a weight [held shared heads * width, ..]: [count * width, ..]."""
        return held if self.sharded else held.narrow(0, self.first * width, self.count * width)

    def reads(self, device: torch.device) -> Tensor:
        """The shared head that each own head reads, counted from `first`: int64 [own]."""
        return (torch.arange(self.own, device=device) + self.offset) // self.run

    def spread(self, x: Tensor) -> Tensor:
        """[T, count, D] to heads that are read in equal runs: x itself where `even`, else [T, own, D]."""
        return x if self.even else x.index_select(1, self.reads(x.device))


def share_heads(heads: int, shared: int, ranks: int, rank: int) -> SharedHeads:
    """The shared heads that `rank` of `ranks` uses; both `shared` and `ranks` must divide `heads`."""
    assert heads % shared == 0 and heads % ranks == 0, (heads, shared, ranks)
    own, run = heads // ranks, heads // shared
    first, offset = divmod(rank * own, run)
    count = (offset + own - 1) // run + 1
    return SharedHeads(sharded=shared % ranks == 0, first=first, count=count, own=own, offset=offset, run=run)
