"""One product with several weights that read the same input, each a parameter of its own.

Joined weights that autograd keeps for the backward are a copy of them for every micro-batch in flight, which
sharding does not free. Here the parts are kept, which are the weights themselves, and are joined again in the
backward: one copy more in passing, for none kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def joined_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    """x [T, d_in] times each of the weights [n, d_in], with their biases [n]: [T, sum of all n]."""
    return _JoinedLinear.apply(x, *weights, *(biases or ()))


# The name of the product's autograd node, whose inputs are x, the weights, and as many biases or none.
NODE = "_JoinedLinearBackward"


def let_weights_wait(node: Any) -> None:
    """The node's backward will leave out the weights' gradients, which weights_factors() are for."""
    node.weights_wait = True


def weights_factors(node: Any, grad: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(a, b, rows of each weight): a @ b is the gradient of the weights, one below another. grad: of the
    product, before its backward is through."""
    x, *weights = node.saved_tensors
    return grad.mT, x, tuple(len(w) for w in weights)


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> Tensor:
        weights = [p for p in parts if p.ndim == 2]
        biases = parts[len(weights) :]
        ctx.save_for_backward(x, *weights)
        ctx.weights, ctx.weights_wait = len(weights), False
        return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        sizes = [len(w) for w in weights]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1:]
        d_weights: Sequence[Tensor | None] = [None] * len(sizes)
        d_biases: Sequence[Tensor | None] = [None] * (len(needs) - len(sizes))
        d_x = grad @ torch.cat(weights) if needs_x else None
        if any(needs[: len(sizes)]) and not ctx.weights_wait:
            d_weights = (grad.mT @ x).split(sizes)
        if any(needs[len(sizes) :]):
            d_biases = grad.sum(0).split(sizes)
        return d_x, *d_weights, *d_biases
