"""Token dispatch by all-to-all: each row to the rank of its expert and back.

parallel.expert_parallel.all_gather is the other dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.expert_parallel.exchange import exchange_rows
from parallel.expert_parallel.routing import Route
from parallel.topology.axis import Axis


def _by_choice(rows: Tensor, route: Route, tokens: int) -> Tensor:
    """Rows [m, d] in the route's order to [tokens, choices, d]; a dropped row is zero."""
    total = tokens * route.choices
    if route.dropless:
        out = rows.new_empty(rows.shape).index_copy_(0, route.order, rows)
    else:
        out = rows.new_zeros(total + 1, rows.shape[1]).index_copy_(0, route.order, rows)[:total]
    return out.view(tokens, route.choices, rows.shape[1])


def _in_order(x: Tensor, index: Tensor, route: Route) -> Tensor:
    """Rows `index` of x, in the route's order. An index beyond the last row gives zeros, to pad an expert."""
    if route.dropless:
        return x.index_select(0, index)
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, index.clamp(max=x.shape[0]))


class _WeightedSum(torch.autograd.Function):
    """The sum of each token's rows times its weights.

    It keeps the rows in the order in which they arrived. Autograd would keep a reordered copy of them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, route: Route) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.route = route
        by_choice = _by_choice(rows, route, weight.shape[0])
        # No batched matrix product: with one row for each token it is slow.
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
    """Rows of x in the order `order`. back: its inverse, which makes the backward one indexed copy too."""
    return linear_map(x, lambda y: y.index_select(0, order), lambda grad: grad.index_select(0, back))


def _exchange(x: Tensor, sends: list[int], receives: list[int], axis: Axis) -> Tensor:
    """All-to-all: the first sends[0] rows of x go to rank 0 of the axis, and so on.

    Returns the received rows in the order of their ranks, receives[r] of them from rank r.
    """

    return linear_map(
        x,
        lambda y: exchange_rows(y, sends, receives, axis),
        lambda grad: exchange_rows(grad, receives, sends, axis),
    )


def dispatch(x: Tensor, route: Route) -> Tensor:
    """Tokens [n, d] to the rows of this rank's experts [m, d], grouped by expert; a collective over ep."""
    tokens = x.shape[0]
    rows = linear_map(
        x,
        lambda y: _in_order(y, route.order // route.choices, route),
        # This adds rows in a fixed order. index_select's own backward does not, on accelerators.
        lambda grad: _by_choice(grad, route, tokens).sum(1),
    )
    if route.regroup is None:
        return rows
    rows = _exchange(rows, route.sends, route.receives, route.axis)
    return _reorder(rows, *route.regroup)


def combine(rows: Tensor, weight: Tensor, route: Route) -> Tensor:
    """Expert outputs [m, d] to tokens [n, d], summed with router weights [n, k]; a collective over ep."""
    if route.regroup is not None:
        rows = _reorder(rows, *reversed(route.regroup))
        rows = _exchange(rows, route.receives, route.sends, route.axis)
    # torch leaves Function.apply untyped.
    out: Tensor = _WeightedSum.apply(rows, weight, route)  # type: ignore[no-untyped-call]
    return out
