"""Autograd collectives over an Axis.

Each function is named for what happens to the data; the gradient is the exact adjoint under the law that
losses are summed, never averaged. "Tokens" are dim 0. Over an axis of size 1 each function is the identity.

    function       forward               backward              used where
    copy_in        identity              all-reduce            replicated tokens into sharded weights
    reduce_out     all-reduce            identity              partial sums out, replicated
    gather_tokens  all-gather tokens     reduce-scatter        token shares into sharded weights
    reduce_tokens  reduce-scatter        all-gather tokens     partial sums out, token shares
    split_tokens   own share of tokens   all-gather tokens     replicated in, each rank works on a share
    join_tokens    all-gather tokens     own share of tokens   shares back to replicated tokens
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axis import Axis


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    y = x.contiguous().clone()
    dist.all_reduce(y, group=axis.group)
    return y


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    y = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    dist.all_gather_into_tensor(y, x.contiguous(), group=axis.group)
    return y


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    _check_even(x, axis)
    y = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    dist.reduce_scatter_tensor(y, x.contiguous(), group=axis.group)
    return y


def _own_share(x: Tensor, axis: Axis) -> Tensor:
    _check_even(x, axis)
    n = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * n, n)


def _check_even(x: Tensor, axis: Axis) -> None:
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} tokens do not split over {axis.name}={axis.size}"


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.axis), None


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.axis), None


class _ReduceTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.axis), None


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _own_share(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.axis), None


class _JoinTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _own_share(grad, ctx.axis).contiguous(), None


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Replicated [..] in, the same out; the ranks' gradients are summed on the way back."""
    return x if axis.size == 1 else _CopyIn.apply(x, axis)


def reduce_out(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [..] in, their sum out on every rank."""
    return x if axis.size == 1 else _ReduceOut.apply(x, axis)


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """[T/size, ..] in, [T, ..] out; gradients of the ranks are summed and scattered."""
    return x if axis.size == 1 else _GatherTokens.apply(x, axis)


def reduce_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, ..] in, each rank's share of the sum [T/size, ..] out."""
    return x if axis.size == 1 else _ReduceTokens.apply(x, axis)


def split_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Replicated [T, ..] in, this rank's share [T/size, ..] out."""
    return x if axis.size == 1 else _SplitTokens.apply(x, axis)


def join_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Shares [T/size, ..] in, replicated [T, ..] out, whose gradient is equal on every rank."""
    return x if axis.size == 1 else _JoinTokens.apply(x, axis)
