"""One product with several weights that read the same input, each a parameter of its own.

F.linear(x, torch.cat(weights)) would keep the joined copy of the weights for the backward of every
micro-batch in flight, and FSDP could not free it. This function keeps the weights themselves and joins them
again in the backward. It trades one temporary copy for none kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def joined_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    """x [T, d_in] times each weight [n_i, d_in], plus its bias [n_i]: [T, sum of n_i]."""
    # torch leaves Function.apply untyped.
    out: Tensor = _JoinedLinear.apply(x, *weights, *(biases or ()))  # type: ignore[no-untyped-call]
    return out


# The name of the product's autograd node. Its inputs are x, the weights, then as many biases or none.
NODE = "_JoinedLinearBackward"


def let_weights_wait(node: Any) -> None:
    """Make the node's backward skip the weights' gradients; weights_factors() gives them later."""
    node.weights_wait = True


def weights_factors(node: Any, grad: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(a, b, rows of each weight), where a @ b is the gradient of the concatenated weights.

    grad: the gradient of the product. Call this before the node's backward frees its saved tensors.
    """
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
            d_weights = torch.split(grad.mT @ x, sizes)
        if any(needs[len(sizes) :]):
            d_biases = torch.split(grad.sum(0), sizes)
        return d_x, *d_weights, *d_biases
