"""Token dispatch for mixtures of experts: each row to the rank of its expert and back.

Dropless by default, with uneven splits. How many rows go where is decided by the router, so this is the one
place where sizes are exchanged at run time. parallel.expert_parallel.all_gather is the other dispatcher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class Route:
    """Where the rows of this rank's tokens go.

    order [m]: rows (token major) sorted by expert, n k of them unless some are dropped, rows n k and on being
    zeros that pad an expert; sends, receives: rows to and from each rank of the ep axis; regroup: order of
    the received rows that puts each local expert's together, and the order that undoes it, None where they
    are together; per_expert: rows of each local expert; dropless: each of the n k rows is in order, once, and
    nothing else.
    """

    axis: Axis
    order: Tensor
    choices: int
    sends: list[int]
    receives: list[int]
    regroup: tuple[Tensor, Tensor] | None
    per_expert: list[int]
    dropless: bool = True


def tally(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs in index (int64): [size]. Unlike bincount it does not wait for
    an accelerator."""
    flat = index.reshape(-1)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def capacity_rows(choices: int, n_experts: int, factor: float) -> int:
    """Rows that an expert may take of a rank's n k = `choices`: factor times its even share, at least one."""
    return max(1, math.ceil(factor * choices / n_experts))


def within_capacity(expert: Tensor, score: Tensor, n_experts: int, rows: int) -> Tensor:
    """Which choices [n, k] (bool) remain if an expert takes at most `rows` of this rank, those scored best.

    expert, score [n, k]. It makes results depend on how tokens are cut over ranks: nothing is dropped
    without it (GShard, arXiv 2006.16668, section 3.2).
    """
    flat = expert.reshape(-1)
    best = torch.argsort(score.detach().reshape(-1), descending=True, stable=True)
    best = best[torch.argsort(flat[best], stable=True)]  # by expert, then by score
    keep = torch.empty_like(flat, dtype=torch.bool)
    keep[best] = _rank_in_group(tally(flat, n_experts), flat.numel()) < rows
    return keep.view_as(expert)


def _rank_in_group(counts: Tensor, total: int) -> Tensor:
    """Place of each row in its own group, groups of these sizes lying one behind another: int64 [total]."""
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=counts.device) - starts


def plan_route(
    expert: Tensor, n_experts: int, axis: Axis, keep: Tensor | None = None, pad: int | None = None
) -> Route:
    """Route from the chosen experts [n, k] (int64) of n tokens; a collective over `axis`, one host wait.

    keep [n, k] (bool): choices that are not dropped, None for all. pad: rows that each expert gets of this
    rank, zeros making up for what lacks; keep must leave no expert more.
    """
    flat = expert.reshape(-1)
    if keep is not None:
        flat = torch.where(keep.reshape(-1), flat, n_experts)  # dropped ones come last
    order = torch.argsort(flat, stable=True)
    counts = tally(flat, n_experts + 1)[:n_experts]
    if pad is not None:
        order, counts = _padded(flat, order, pad, n_experts)
    dropless = keep is None and pad is None
    if axis.size == 1:
        per_expert = counts.tolist()
        kept = order[: sum(per_expert)]
        return Route(axis, kept, expert.shape[1], [], [], None, per_expert, dropless)
    local = n_experts // axis.size
    arriving = torch.empty_like(counts)  # [source rank, local expert]
    dist.all_to_all_single(arriving, counts, group=axis.group)
    table = torch.stack([counts, arriving]).view(2, axis.size, local)
    leaving, incoming = table.tolist()  # the one wait for the device
    sends, receives = [sum(rows) for rows in leaving], [sum(rows) for rows in incoming]
    regroup = group_by_expert(arriving, local, sum(receives))
    back = torch.empty_like(regroup)
    back[regroup] = torch.arange(len(regroup), device=back.device)
    kept = order[: sum(sends)]
    return Route(axis, kept, expert.shape[1], sends, receives, (regroup, back), columns(incoming), dropless)


def _padded(flat: Tensor, order: Tensor, rows: int, n_experts: int) -> tuple[Tensor, Tensor]:
    """Order and counts with exactly `rows` for each expert; flat: the expert of each row or n_experts."""
    counts = tally(flat, n_experts + 1)
    expert = flat[order]
    # Dropped rows and rows that pad share one slot behind the others, which is cut off.
    slot = expert * rows + _rank_in_group(counts, len(flat))
    slot = torch.where(expert < n_experts, slot, n_experts * rows)
    out = order.new_full((n_experts * rows + 1,), len(flat)).scatter_(0, slot, order)[:-1]
    return out, counts.new_full((n_experts,), rows)


def group_by_expert(counts: Tensor, experts: int, total: int) -> Tensor:
    """The order of all ranks' rows, end to end, that puts each expert's together: int64 [total].

    counts [ranks * experts]: the rows of each rank for each expert, in this order already; total: their sum.
    """
    expert = torch.arange(experts, device=counts.device).repeat(len(counts) // experts)
    return torch.argsort(expert.repeat_interleave(counts, output_size=total), stable=True)


def columns(table: list[list[int]]) -> list[int]:
    """The sum of each column."""
    return [sum(column) for column in zip(*table, strict=True)]


def _by_choice(rows: Tensor, route: Route, tokens: int) -> Tensor:
    """Rows [m, d] in the route's order to [tokens, choices, d]; zeros for what was dropped."""
    total = tokens * route.choices
    if route.dropless:
        out = rows.new_empty(rows.shape).index_copy_(0, route.order, rows)
    else:
        out = rows.new_zeros(total + 1, rows.shape[1]).index_copy_(0, route.order, rows)[:total]
    return out.view(tokens, route.choices, rows.shape[1])


def _in_order(x: Tensor, index: Tensor, route: Route) -> Tensor:
    """Rows `index` of x in the route's order; zeros for those beyond the last, which pad an expert."""
    if route.dropless:
        return x.index_select(0, index)
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, index.clamp(max=x.shape[0]))


class _Gather(torch.autograd.Function):
    """Each token's rows, times its weights, summed. Keeps the rows as they came, where autograd would keep
    copies of them in another order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, route: Route) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.route = route
        by_choice = _by_choice(rows, route, weight.shape[0])
        # Not a product of matrices: those of one row each are slow.
        return by_choice.mul_(weight.to(rows.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        route = ctx.route
        grad = _in_order(grad, route.order // route.choices, route)  # [m, d]
        d_weight = (grad * rows).sum(-1, keepdim=True, dtype=weight.dtype)
        scale = _in_order(weight.reshape(-1, 1), route.order, route).to(grad.dtype)
        return grad * scale, _by_choice(d_weight, route, weight.shape[0]).squeeze(-1), None


def _reorder(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Rows in another order, which `back` undoes: so the backward is one indexed copy too."""
    return linear_map(x, lambda y: y.index_select(0, order), lambda grad: grad.index_select(0, back))


def _exchange(x: Tensor, sends: list[int], receives: list[int], axis: Axis) -> Tensor:
    """The first sends[0] rows to rank 0 of the axis and so on; the result is what came, rank by rank."""

    def move(y: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        out = y.new_empty((sum(arriving), *y.shape[1:]))
        dist.all_to_all_single(out, y.contiguous(), arriving, leaving, group=axis.group)
        return out

    return linear_map(x, lambda y: move(y, sends, receives), lambda grad: move(grad, receives, sends))


def dispatch(x: Tensor, route: Route) -> Tensor:
    """Tokens [n, d] to the rows of this rank's experts [m, d], grouped by expert."""
    tokens = x.shape[0]
    rows = linear_map(
        x,
        lambda y: _in_order(y, route.order // route.choices, route),
        # In a fixed order, in which index_select's own backward does not add them on accelerators.
        lambda grad: _by_choice(grad, route, tokens).sum(1),
    )
    if route.regroup is None:
        return rows
    rows = _exchange(rows, route.sends, route.receives, route.axis)
    return _reorder(rows, *route.regroup)


def combine(rows: Tensor, weight: Tensor, route: Route) -> Tensor:
    """Expert outputs [m, d] back to tokens [n, d], summed with the router's weights [n, k]."""
    if route.regroup is not None:
        rows = _reorder(rows, *reversed(route.regroup))
        rows = _exchange(rows, route.receives, route.sends, route.axis)
    return _Gather.apply(rows, weight, route)


def grouped_linear(rows: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    """Each expert's rows times its weight: [m, d_in], [E, d_out, d_in] -> [m, d_out].

    One grouped product where torch has it (16-byte rows, not float64), else a product per expert. Every
    expert's weight is in the graph even without rows, so that gradient reduction stays matched.
    """
    # The grouped product leaves rows past the last expert's end uninitialised, in its gradient too.
    assert rows.shape[0] == sum(per_expert), (rows.shape, per_expert)
    aligned = all(n * rows.element_size() % 16 == 0 for n in weight.shape[1:])
    if rows.dtype != torch.float64 and aligned and rows.shape[0]:
        ends = torch.tensor(per_expert, device=rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    parts = rows.split(per_expert)
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight.unbind(0), strict=True)])
