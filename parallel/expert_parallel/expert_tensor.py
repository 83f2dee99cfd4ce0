"""Tensor parallelism inside experts: etp ranks hold slices of the same experts' features.

Each brought rows of its own to them. Rows are gathered over etp before the expert, whose slice gives every
row a part of its result, and the parts are summed on the way back to the rank that brought the row
(arXiv 2504.14960, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.expert_parallel.all_to_all import columns, group_by_expert
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class Share:
    """The rows that etp ranks bring to the experts that they share.

    rows: of each rank; regroup [sum(rows)]: the order of all ranks' rows, end to end, that puts each expert's
    together; per_expert: rows of each expert, of all ranks.
    """

    axis: Axis
    rows: list[int]
    regroup: Tensor
    per_expert: list[int]


def plan_share(per_expert: list[int], axis: Axis, device: torch.device) -> Share | None:
    """A collective over `axis`, with a host wait, on the rows [experts] that this rank brings; None where
    the axis has one rank."""
    if axis.size == 1:
        return None
    mine = torch.tensor(per_expert, device=device)
    counts = mine.new_empty(axis.size * len(per_expert))  # [rank, expert]
    dist.all_gather_into_tensor(counts, mine, group=axis.group)
    table = counts.view(axis.size, -1).tolist()
    rows = [sum(r) for r in table]
    regroup = group_by_expert(counts, len(per_expert), sum(rows))
    return Share(axis, rows, regroup, columns(table))


def _gather(x: Tensor, share: Share) -> Tensor:
    size, own = share.axis.size, share.rows[share.axis.rank]
    out = x.new_empty((sum(share.rows), *x.shape[1:]))
    leaving = x.repeat(size, *(1 for _ in x.shape[1:]))
    dist.all_to_all_single(out, leaving, share.rows, [own] * size, group=share.axis.group)
    return out.index_select(0, share.regroup)


def _reduce(x: Tensor, share: Share) -> Tensor:
    size, own = share.axis.size, share.rows[share.axis.rank]
    by_rank = x.new_empty(x.shape).index_copy_(0, share.regroup, x)
    out = x.new_empty((size * own, *x.shape[1:]))
    dist.all_to_all_single(out, by_rank, [own] * size, share.rows, group=share.axis.group)
    return out.unflatten(0, (size, own)).sum(0)


def gather_rows(x: Tensor, share: Share) -> Tensor:
    """Own rows [m, d], grouped by expert, to all etp ranks' rows, grouped by expert; gradients are summed."""
    return linear_map(x, lambda y: _gather(y, share), lambda grad: _reduce(grad, share))


def reduce_rows(x: Tensor, share: Share) -> Tensor:
    """This rank's part of every row's result to the sum over etp of its own rows [m, d]."""
    return linear_map(x, lambda y: _reduce(y, share), lambda grad: _gather(grad, share))
