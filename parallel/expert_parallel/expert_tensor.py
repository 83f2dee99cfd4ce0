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
from parallel.expert_parallel.routing import columns, group_by_expert
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class EtpRows:
    """The rows that etp ranks bring to the experts that they etp.

    rows: of each rank; regroup [sum(rows)]: the order of all ranks' rows, end to end, that puts each expert's
    together; per_expert: rows of each expert, of all ranks.
    """

    axis: Axis
    rows: list[int]
    regroup: Tensor
    per_expert: list[int]


def plan_etp_rows(per_expert: list[int], axis: Axis, device: torch.device) -> EtpRows | None:
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
    return EtpRows(axis, rows, regroup, columns(table))


def _gather(x: Tensor, etp: EtpRows) -> Tensor:
    size, own = etp.axis.size, etp.rows[etp.axis.rank]
    out = x.new_empty((sum(etp.rows), *x.shape[1:]))
    leaving = x.repeat(size, *(1 for _ in x.shape[1:]))
    dist.all_to_all_single(out, leaving, etp.rows, [own] * size, group=etp.axis.group)
    return out.index_select(0, etp.regroup)


def _reduce(x: Tensor, etp: EtpRows) -> Tensor:
    size, own = etp.axis.size, etp.rows[etp.axis.rank]
    by_rank = x.new_empty(x.shape).index_copy_(0, etp.regroup, x)
    out = x.new_empty((size * own, *x.shape[1:]))
    dist.all_to_all_single(out, by_rank, [own] * size, etp.rows, group=etp.axis.group)
    return out.unflatten(0, (size, own)).sum(0)


def gather_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """Own rows [m, d], grouped by expert, to all etp ranks' rows, grouped by expert; gradients are summed."""
    return linear_map(x, lambda y: _gather(y, etp), lambda grad: _reduce(grad, etp))


def reduce_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """This rank's part of every row's result to the sum over etp of its own rows [m, d]."""
    return linear_map(x, lambda y: _reduce(y, etp), lambda grad: _gather(grad, etp))
