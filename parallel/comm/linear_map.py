"""A linear map that autograd has no formula for, with its adjoint: communication, or reordered rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def linear_map(x: Tensor, there: Map, back: Map) -> Tensor:
    """there(x), whose gradient goes to x through back().

    back() must be the adjoint of there(). For a map over several ranks, it is the adjoint of what all of them
    do together. x is not saved for the backward, so neither function may keep a reference to it. Both may
    return what they are given, or a view of it. Gradients of gradients work too.
    """
    apply: Callable[[Tensor, Map, Map], Tensor] = _LinearMap.apply  # which torch leaves untyped
    return apply(x, there, back)


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.there, ctx.back = there, back
        y = there(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Recorded for gradients of gradients only: `back` is a linear map too, and its adjoint is `there`.
        d_x = linear_map(grad, ctx.back, ctx.there) if torch.is_grad_enabled() else ctx.back(grad)
        return d_x, None, None
