"""A backward in two halves gives the gradients of one backward, for the same matrix products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.schedule.executor.halves import backward_input, backward_weight
from parallel.tensor_parallel.joined import joined_linear

D = 6
# Ways to use weights: how a layer of each kind takes x [T, D] and its parameters.
LAYERS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, p: F.linear(x, p["square"], p["bias"]),
    "no bias": lambda x, p: torch.tanh(F.linear(x, p["square"])),
    "not transposed": lambda x, p: x @ p["square"] + x,
    "weight first": lambda x, p: (p["square"] @ x.mT).mT,
    "norm": lambda x, p: F.layer_norm(x, (D,), p["bias"]),
    "joined": lambda x, p: F.linear(x, torch.cat([p["square"][:2], p["other"][2:]])) + x,
    "own joined": lambda x, p: joined_linear(
        x, [p["square"][:2], p["other"][2:]], [p["bias"][:2], p["bias"][2:]]
    ),
    "weights of one": lambda x, p: joined_linear(x, [p["square"][:2] @ p["other"], p["other"][2:]]) + x,
    "experts": lambda x, p: torch.cat([F.linear(a, w) for a, w in zip(x.split(4), p["three"], strict=True)]),
    "scaled": lambda x, p: torch.addmm(x, x, p["other"], alpha=0.5),
    "products of weights": lambda x, p: x @ (p["square"] @ p["other"]),
    "otherwise": lambda x, p: x * p["square"].sum() + p["other"][0],
    "residual": lambda x, p: x + F.silu(F.linear(x, p["other"])) * F.linear(x, p["square"]),
}


class Stack(nn.Module):
    """Layers of some kinds; `shared` draws all of them from one set of parameters."""

    def __init__(self, kinds: list[str], shared: bool) -> None:
        super().__init__()
        torch.manual_seed(len(kinds))
        self.kinds = kinds
        self.sets = nn.ModuleList(_parameters() for _ in range(1 if shared else len(kinds)))

    def forward(self, x: Tensor) -> Tensor:
        for k, kind in enumerate(self.kinds):
            x = LAYERS[kind](x, self.sets[k % len(self.sets)])
        return x


def _parameters() -> nn.ParameterDict:
    shapes = {"square": (D, D), "other": (D, D), "three": (3, D, D), "bias": (D,)}
    return nn.ParameterDict(
        {n: nn.Parameter(torch.randn(s, dtype=torch.float64) / 3) for n, s in shapes.items()}
    )


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen["products"] += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in (x, *model.parameters())]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5), st.booleans())
def test_two_halves_are_one_backward(kinds: list[str], shared: bool) -> None:
    model = Stack(kinds, shared)
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(12, D, dtype=torch.float64)
    with Products() as once:
        model(x).backward(grad)
    want = gradients(model, x)
    model.zero_grad()
    x.grad = None
    with Products() as halves:
        output = model(x)
        kept = backward_input(output, grad, [x])
        torch.testing.assert_close(x.grad, want[0], rtol=1e-12, atol=1e-12)
        before = gradients(model, x)
        backward_weight(kept)
    for got, wanted, early in zip(gradients(model, x), want, before, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
            assert early is None or torch.equal(early, got)  # each weight is done in one of the halves
    assert halves.seen == once.seen
    with pytest.raises(RuntimeError, match="through the graph a second time"):  # its memory is given back
        output.backward(grad)


def test_products_wait_and_the_rest_does_not() -> None:
    model = Stack(["norm", "linear", "no bias"], shared=False)
    x = torch.randn(12, D, dtype=torch.float64, requires_grad=True)
    kept = backward_input(model(x).sum(), None, [x])
    done = {n for n, p in model.named_parameters() if p.grad is not None}
    assert done == {"sets.0.bias", "sets.1.bias"}
    backward_weight(kept)
    done = {n for n, p in model.named_parameters() if p.grad is not None} - done
    assert done == {"sets.1.square", "sets.2.square"}


def test_an_output_without_the_inputs_gives_all_weights_at_once() -> None:
    model = Stack(["no bias"], shared=False)
    x, other = (torch.ones(12, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert backward_input(model(x.detach()).sum(), None, [other]) == []
    assert other.grad is None and model.sets[0]["square"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_wait(turned: bool, dtype: torch.dtype) -> None:
    """However the weights lie in memory, and with a group that has no rows."""
    gen = torch.Generator().manual_seed(0)
    x, grad = torch.randn(24, 16, generator=gen).to(dtype), torch.randn(24, 8, generator=gen).to(dtype)
    three = torch.randn((3, 8, 16) if turned else (3, 16, 8), generator=gen).to(dtype)
    ends = torch.tensor([9, 9, 24], dtype=torch.int32)
    found = []
    for halves in (False, True):
        rows, weight = x.clone().requires_grad_(), three.clone().requires_grad_()
        out = F.grouped_mm(rows, weight.mT if turned else weight, offs=ends)
        if halves:
            kept = backward_input(out, grad, [rows])
            assert weight.grad is None
            backward_weight(kept)
        else:
            out.backward(grad)
        found.append([rows.grad, weight.grad])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    expected = x[9:].double().mT @ grad[9:].double()
    got = found[1][1][2].mT if turned else found[1][1][2]
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
