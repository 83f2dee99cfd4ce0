"""Autograd collectives over an Axis.

Each function is named for what happens to the data. Its backward is the exact adjoint, given that losses are
summed and never averaged (law 2). "Tokens" are dim 0. Over an axis of size 1 each function is the identity.

    function       forward               backward              used where
    copy_in        identity              all-reduce            replicated tokens into sharded weights
    reduce_out     all-reduce            identity              partial sums out, replicated
    gather_tokens  all-gather tokens     reduce-scatter        token shares into sharded weights
    reduce_tokens  reduce-scatter        all-gather tokens     partial sums out, token shares
    split_tokens   own share of tokens   all-gather tokens     replicated in, each rank works on a share
    join_tokens    all-gather tokens     own share of tokens   shares back to replicated tokens
    sum_parts      all-reduce            all-reduce            a sum over ranks' features, which all read
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.comm.turns import in_turns
from parallel.topology.axis import Axis


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x


def _all_reduce(x: Tensor, axis: Axis) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=axis.group)
    return y


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    y = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    x = x.contiguous()

    def start(later: bool) -> dist.Work | None:
        work: dist.Work | None = dist.all_gather_into_tensor(y, x, group=axis.group, async_op=later)
        return work

    # Choices of experts are numbers that the host reads at once.
    in_turns(axis.turns if x.is_floating_point() else None, start)
    return y


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    _check_even(x, axis)
    y = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    x = x.contiguous()

    def start(later: bool) -> dist.Work | None:
        work: dist.Work | None = dist.reduce_scatter_tensor(y, x, group=axis.group, async_op=later)
        return work

    in_turns(axis.turns, start)
    return y


def _own_share(x: Tensor, axis: Axis) -> Tensor:
    _check_even(x, axis)
    n = x.shape[0] // axis.size
    return x.narrow(0, axis.rank * n, n)


def _check_even(x: Tensor, axis: Axis) -> None:
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} tokens do not split over {axis.name}={axis.size}"


def _over(
    axis: Axis, x: Tensor, there: Callable[[Tensor, Axis], Tensor], back: Callable[[Tensor, Axis], Tensor]
) -> Tensor:
    """`there` with the adjoint `back`. The six collectives below differ in this pair alone."""
    if axis.size == 1:
        return x
    return linear_map(x, lambda y: there(y, axis), lambda grad: back(grad, axis))


def copy_in(x: Tensor, axis: Axis) -> Tensor:
    """Replicated [..] in, the same out. The backward sums the ranks' gradients."""
    return _over(axis, x, _same, _all_reduce)


def reduce_out(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [..] in, their sum out on every rank."""
    return _over(axis, x, _all_reduce, _same)


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Shares [T/size, ..] in, all tokens [T, ..] out. The backward scatters the sum of gradients."""
    return _over(axis, x, _all_gather, _reduce_scatter)


def reduce_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, ..] in, each rank's share of their sum [T/size, ..] out."""
    return _over(axis, x, _reduce_scatter, _all_gather)


def split_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Replicated [T, ..] in, this rank's share [T/size, ..] out."""
    return _over(axis, x, _own_share, _all_gather)


def join_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Shares [T/size, ..] in, replicated [T, ..] out. The result's gradient must be equal on every rank."""
    return _over(axis, x, _all_gather, _own_share)


def sum_parts(x: Tensor, axis: Axis) -> Tensor:
    """Parts of a sum [..] in, the sum out on every rank, which uses it for features of its own. The backward
    sums the ranks' gradients."""
    return _over(axis, x, _all_reduce, _all_reduce)
