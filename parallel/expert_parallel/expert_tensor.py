"""Tensor parallelism inside experts: etp ranks hold slices of the features of the same experts.

Every etp rank has rows of its own for these experts. gather_rows() brings the rows of all etp ranks to each
slice, which computes a partial result of every row. reduce_rows() sums the partial results on the rank that
the row came from (Liu et al., MoE Parallel Folding, arXiv 2504.14960, section 3.2).
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
    """The rows that etp ranks bring to the experts whose features are sharded over them.

    axis: the etp axis.
    rows: rows of each rank.
    regroup: int64 [sum(rows)], the order of all ranks' rows, concatenated by rank, that puts each expert's
        rows together.
    per_expert: rows of each expert, from all ranks.
    """

    axis: Axis
    rows: list[int]
    regroup: Tensor
    per_expert: list[int]


def plan_etp_rows(per_expert: list[int], axis: Axis, device: torch.device) -> EtpRows | None:
    """The plan of gather_rows() and reduce_rows(), None where `axis` has one rank.

    per_expert: rows of each expert on this rank. A collective over `axis`, with one host wait.
    """
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
    return torch.unflatten(out, 0, (size, own)).sum(0)


def gather_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """Own rows [m, d] to the rows of all etp ranks, both grouped by expert; gradients are summed over etp."""
    return linear_map(x, lambda y: _gather(y, etp), lambda grad: _reduce(grad, etp))


def reduce_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """Partial results of all etp ranks' rows to the sums over etp of this rank's own rows [m, d]."""
    return linear_map(x, lambda y: _reduce(y, etp), lambda grad: _gather(grad, etp))
