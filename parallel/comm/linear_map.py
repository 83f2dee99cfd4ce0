"""A linear map that autograd does not know, and its adjoint: communication, and rows in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def linear_map(x: Tensor, there: Map, back: Map) -> Tensor:
    """there(x); a gradient of it goes to x through back(), which must be the adjoint of there().

    For a map over several ranks that is the adjoint of what all of them do together. Nothing of x is kept,
    so let neither function hold on to it. Both may return what they are given, or a view of it.
    """
    out: Tensor = _LinearMap.apply(x, there, back)
    return out


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.there, ctx.back = there, back
        y = there(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Recorded only for gradients of gradients: the adjoint is a linear map too, and this its adjoint.
        d_x = linear_map(grad, ctx.back, ctx.there) if torch.is_grad_enabled() else ctx.back(grad)
        return d_x, None, None
