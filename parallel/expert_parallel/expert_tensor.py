"""Tensor parallelism inside experts: etp ranks hold slices of the features of the same experts.

Every etp rank has rows of its own for these experts. gather_rows() brings the rows of all etp ranks to each
slice, which computes a partial result of every row. reduce_rows() sums the partial results on the rank that
the row came from (Liu et al., MoE Parallel Folding, arXiv 2504.14960, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.expert_parallel.exchange import exchange_rows
from parallel.expert_parallel.routing import EtpRows


def _gather(x: Tensor, etp: EtpRows) -> Tensor:
    size, own = etp.axis.size, etp.rows[etp.axis.rank]
    leaving = x.repeat(size, *(1 for _ in x.shape[1:]))
    return exchange_rows(leaving, [own] * size, etp.rows, etp.axis).index_select(0, etp.regroup)


def _reduce(x: Tensor, etp: EtpRows) -> Tensor:
    size, own = etp.axis.size, etp.rows[etp.axis.rank]
    by_rank = x.new_empty(x.shape).index_copy_(0, etp.regroup, x)
    out = exchange_rows(by_rank, etp.rows, [own] * size, etp.axis)
    return torch.unflatten(out, 0, (size, own)).sum(0)


def gather_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """Own rows [m, d] to the rows of all etp ranks, both grouped by expert; gradients are summed over etp."""
    return linear_map(x, lambda y: _gather(y, etp), lambda grad: _reduce(grad, etp))


def reduce_rows(x: Tensor, etp: EtpRows) -> Tensor:
    """Partial results of all etp ranks' rows to the sums over etp of this rank's own rows [m, d]."""
    return linear_map(x, lambda y: _reduce(y, etp), lambda grad: _gather(grad, etp))
