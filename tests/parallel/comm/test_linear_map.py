"""Maps that autograd does not know: gradients by the adjoint, of gradients too, and nothing kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.context_parallel import ContextPacking, pack
from parallel.context_parallel.ulysses import to_heads, to_tokens
from parallel.expert_parallel.expert_tensor import gather_rows, reduce_rows
from parallel.expert_parallel.routing import etp_rows
from parallel.sequence.stream import Order
from parallel.topology.axis import Axis


def make(seed: int, *shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_gradients_are_those_of_the_matrix(rows: int, columns: int, seed: int) -> None:
    matrix, x, y = make(seed, rows, columns), make(seed + 1, columns), make(seed + 2, rows)
    x.requires_grad_()
    ours = linear_map(x, lambda v: matrix @ v, lambda grad: matrix.T @ grad)
    assert torch.equal(ours, matrix @ x)
    grads = [torch.autograd.grad((z.sin() * y).sum(), x, create_graph=True)[0] for z in (ours, matrix @ x)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-14)
    second = [torch.autograd.grad(grad.square().sum(), x)[0] for grad in grads]
    torch.testing.assert_close(*second, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("there", [lambda v: v, lambda v: v[:2], lambda v: v.view(3, 1)])
def test_a_result_may_be_what_was_given_or_a_view_of_it(there: Callable[[Tensor], Tensor]) -> None:
    x = make(0, 3).requires_grad_()
    out = linear_map(x, there, lambda grad: 2 * torch.cat([grad.reshape(-1), torch.zeros(3)])[:3])
    assert out is not x and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    (out * 3).sum().backward()
    assert x.grad is not None and x.grad[0] == 6 and x.is_leaf


def test_nothing_of_the_input_is_kept() -> None:
    weight = make(0, 4).requires_grad_()
    x = weight * 2
    gone = weakref.ref(x)
    out = linear_map(x, lambda v: v.flip(0), lambda grad: grad.flip(0))
    del x
    gc.collect()
    assert gone() is None
    out.sum().backward()
    assert torch.equal(weight.grad, torch.full((4,), 2.0, dtype=torch.float64))


def both_ways(f: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> tuple[float, float]:
    """<f(x), y> and <x, f'(y)>, each summed over ranks. y is not contiguous, as gradients need not be."""
    x.requires_grad_()
    z = f(x)
    y = make(seed, *reversed(z.shape)).permute(*reversed(range(z.ndim)))
    (grad,) = torch.autograd.grad(z, x, y)
    both = torch.stack([(z.detach() * y).sum(), (x.detach() * grad).sum()])
    dist.all_reduce(both)
    return float(both[0]), float(both[1])


def products(order: Order) -> dict[str, tuple[float, float]]:
    n, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis("cp", n, rank, dist.group.WORLD)
    packing = pack([5, 0, 8 * n - 5], "cpu", axis, order)
    assert isinstance(packing, ContextPacking)
    meeting = torch.tensor([[r + 1, 0, 2] for r in range(n)])  # rows of each rank by expert
    etp = etp_rows(meeting, meeting.sum(1).tolist(), axis)
    return {
        "to_heads": both_ways(lambda x: to_heads(x, packing), make(rank, 8, n, 3), 10 + rank),
        "to_tokens": both_ways(lambda x: to_tokens(x, packing), make(rank, 8 * n, 3), 10 + rank),
        "gather_rows": both_ways(lambda x: gather_rows(x, etp), make(rank, rank + 3, 2), 10 + rank),
        "reduce_rows": both_ways(lambda x: reduce_rows(x, etp), make(rank, etp.experts.total, 2), 10 + rank),
    }


@pytest.mark.parametrize(("n", "order"), [(2, "zigzag"), (3, "contiguous")])
def test_maps_over_ranks_are_adjoint_to_their_backward(n: int, order: Order, ranks: Any) -> None:
    for result in ranks(n, products, order):
        for name, (forward, backward) in result.items():
            assert forward == pytest.approx(backward, rel=1e-12), name
