"""Rows of a packed tensor brought together inside one axis.

Each rank of an axis holds a stretch of the rows, and needs others beside its own: the keys of a sequence that
goes on elsewhere, the neighbours that a convolution sees. They come by the least-bytes plans of
parallel.boundary, where every rank of the axis is a lane of its own; the gradients of all that used a row are
summed where the row is held.

    fetch = make_fetch("keys", axes.cp, held, wanted)   # once a batch; pure but for the group
    for layer in layers:
        k = fetch(layer.keys(x))                        # [rows held, ..] to [rows wanted, ..], autograd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axis import Axis
from parallel.boundary import BoundaryCommunicator, EdgePlan, RowMap, plan_edge

Span = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True)
class RowFetch:
    """A planned fetch, to be shared by the layers of a batch. Calls are collective over the axis: every rank
    makes them in the same order, those that hold and want no rows too."""

    plan: EdgePlan
    communicator: BoundaryCommunicator

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..], by ascending row; may share memory with x.

        Whether x requires a gradient must be the same on all ranks: no gradient is sent back where it does
        not. Raises ValueError where x has other rows than planned, RuntimeError for a peer that is silent.
        """
        return self.communicator.exchange(self.plan, x, grads=x.requires_grad)


@dataclass(frozen=True)
class RowPick:
    """What is left of a fetch on an axis of one rank, which holds all. rows: stretches of its `held` rows."""

    name: str
    held: int
    rows: tuple[Span, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] != self.held:
            raise ValueError(f"{self.name}: {x.shape[0]} rows given, the plan has {self.held}")
        if self.rows == ((0, self.held),):
            return x
        return torch.cat([x[a:b] for a, b in self.rows] or [x[:0]])


Fetch = RowFetch | RowPick


def fetch_plan(
    name: str, ranks: Sequence[int], held: Sequence[Span], wanted: Sequence[Sequence[Span]], rank: int
) -> EdgePlan:
    """The part of global rank `rank` in a fetch among `ranks`. Pure.

    held: the rows that each of `ranks` holds, stretches that do not overlap, in any order, some maybe empty.
    wanted: the stretches that each wants, ascending and apart. Raises ValueError where a wanted row is held
    by none, or is wanted twice by one rank.
    """
    if not len(ranks) == len(held) == len(wanted):
        raise ValueError(
            f"{name}: {len(ranks)} ranks, but {len(held)} stretches held and {len(wanted)} lists wanted"
        )
    lanes = [(r,) for r in ranks]
    some = [(i, a, b) for i, (a, b) in enumerate(held) if b > a]
    want = [(i, a, b) for i, spans in enumerate(wanted) for a, b in spans if b > a]
    if any(i == j and stop > start for (i, _, stop), (j, start, _) in pairwise(want)):
        raise ValueError(f"{name}: the stretches that a rank wants must ascend and not overlap")
    source, dest = (
        RowMap.of_runs(lanes, [a for _, a, _ in runs], [b - a for _, a, b in runs], [i for i, _, _ in runs])
        for runs in (some, want)
    )
    return plan_edge(name, source, dest, rank)


def make_fetch(
    name: str,
    axis: Axis,
    held: Sequence[Span],
    wanted: Sequence[Sequence[Span]],
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = 120.0,
) -> Fetch:
    """Plan a fetch over `axis`; held and wanted are by rank of the axis, known alike on all (fetch_plan)."""
    if axis.size == 1:
        ((low, high),), (spans,) = held, wanted
        assert all(low <= a <= b <= high for a, b in spans), f"{name}: {spans} of {(low, high)}"
        return RowPick(name, high - low, tuple((a - low, b - low) for a, b in spans))
    assert axis.group is not None
    ranks = dist.get_process_group_ranks(axis.group)
    plan = fetch_plan(name, ranks, held, wanted, ranks[axis.rank])
    return RowFetch(plan, BoundaryCommunicator(axis.group, device=device, timeout_s=timeout_s))
