"""A linear map that autograd does not know, and its adjoint: communication, and rows in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_map(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """there(x); a gradient of it goes to x through back(), which must be the adjoint of there().

    For a map over several ranks that is the adjoint of what all of them do together. Nothing of x is kept,
    so let neither function hold on to it. Both may return what they are given, or a view of it. Gradients of
    gradients are refused (RuntimeError).
    """
    out: Tensor = _LinearMap.apply(x, there, back)
    return out


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        y = there(x)
        return y.view_as(y) if y is x else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None
