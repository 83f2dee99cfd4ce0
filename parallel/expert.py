"""Token dispatch for mixtures of experts: each row to the rank of its expert and back.

Dropless, with uneven splits. How many rows go where is decided by the router, so this is the one place where
sizes are exchanged at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.axis import Axis


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
        ctx.back = (receive, send, axis)
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, axis = ctx.back
        out = grad.new_empty((sum(receive), *grad.shape[1:]))
        dist.all_to_all_single(out, grad.contiguous(), receive, send, group=axis.group)
        return out, None, None, None


@dataclass(frozen=True)
class Route:
    """Where the rows of this rank's tokens go.

    order [n k]: rows (token major) sorted by expert; sends, receives: rows to and from each rank of the ep
    axis; regroup: order of the received rows that puts each local expert's together, None where they are;
    per_expert: rows of each local expert.
    """

    axis: Axis
    order: Tensor
    choices: int
    sends: list[int]
    receives: list[int]
    regroup: Tensor | None
    per_expert: list[int]


def plan_route(expert: Tensor, n_experts: int, axis: Axis) -> Route:
    """Route from the chosen experts [n, k] (int64) of n tokens; a collective over `axis`, one host wait."""
    flat = expert.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_experts)
    if axis.size == 1:
        return Route(axis, order, expert.shape[1], [], [], None, counts.tolist())
    local = n_experts // axis.size
    arriving = torch.empty_like(counts)  # [source rank, local expert]
    dist.all_to_all_single(arriving, counts, group=axis.group)
    table = torch.stack([counts, arriving]).view(2, axis.size, local)
    leaving, incoming = table.tolist()  # the one wait for the device
    sends, receives = [sum(rows) for rows in leaving], [sum(rows) for rows in incoming]
    which = torch.arange(local, device=flat.device).repeat(axis.size)
    arrived = which.repeat_interleave(arriving, output_size=sum(receives))
    regroup = torch.argsort(arrived, stable=True)
    return Route(axis, order, expert.shape[1], sends, receives, regroup, _columns(incoming))


def _columns(table: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*table, strict=True)]


class _Deal(torch.autograd.Function):
    """A row for each choice of each token, in `order`. The backward adds a token's rows in a fixed order,
    which index_select's own does not on accelerators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.choices = choices
        return x.index_select(0, order // choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        rows = torch.empty_like(grad).index_copy_(0, order, grad)
        return rows.view(-1, ctx.choices, grad.shape[1]).sum(1), None, None


def dispatch(x: Tensor, route: Route) -> Tensor:
    """Tokens [n, d] to the rows of this rank's experts [m, d], grouped by expert."""
    rows = _Deal.apply(x, route.order, route.choices)
    if route.regroup is None:
        return rows
    return _AllToAll.apply(rows, route.sends, route.receives, route.axis).index_select(0, route.regroup)


def combine(rows: Tensor, weight: Tensor, route: Route) -> Tensor:
    """Expert outputs [m, d] back to tokens [n, d], summed with the router's weights [n, k]."""
    if route.regroup is not None:
        rows = torch.empty_like(rows).index_copy(0, route.regroup, rows)
        rows = _AllToAll.apply(rows, route.receives, route.sends, route.axis)
    tokens = torch.empty_like(rows).index_copy(0, route.order, rows)
    return torch.einsum("nkd,nk->nd", tokens.view(*weight.shape, rows.shape[-1]), weight.to(rows.dtype))


def grouped_linear(rows: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    """Each expert's rows times its weight: [m, d_in], [E, d_out, d_in] -> [m, d_out].

    One grouped product where torch has it (16-byte rows, not float64), else a product per expert. Every
    expert's weight is in the graph even without rows, so that gradient reduction stays matched.
    """
    aligned = all(n * rows.element_size() % 16 == 0 for n in weight.shape[1:])
    if rows.dtype != torch.float64 and aligned and rows.shape[0]:
        ends = torch.tensor(per_expert, device=rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    parts = rows.split(per_expert)
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight.unbind(0), strict=True)])
