"""Turns of two computations: one at a time, in a fixed order; errors leave nothing behind."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from parallel.comm.linear_map import linear_map
from parallel.comm.turns import Turns

CPU = torch.device("cpu")


@pytest.fixture
def turns() -> Any:
    before = threading.active_count()
    made = Turns(CPU)
    yield made
    made.close()
    assert threading.active_count() == before


def speaker(turns: Turns, said: list[str], name: str, times: int) -> Callable[[], str]:
    """Says its name, hands over, and so on; `times` hand-overs."""

    def run() -> str:
        for _ in range(times):
            said.append(name)
            turns.hand_over()
        said.append(name)
        return name

    return run


@given(st.integers(0, 5), st.integers(0, 5))
def test_two_alternate_and_the_longer_goes_on_alone(a: int, b: int) -> None:
    turns, said = Turns(CPU), list[str]()
    for _ in range(2):
        ran = turns.run(speaker(turns, said, "a", a), speaker(turns, said, "b", b))
        assert [r.result for r in ran] == ["a", "b"]
    turns.close()
    both = [name for k in range(max(a, b) + 1) for name, n in (("a", a), ("b", b)) if k <= n]
    assert said == 2 * both
    assert not turns.shared
    turns.hand_over()  # nobody is there: nothing happens


def test_seconds_are_those_of_the_own_turns(turns: Turns) -> None:
    def sleeper(one: float) -> Callable[[], None]:
        def run() -> None:
            for _ in range(2):
                time.sleep(one)
                turns.hand_over()

        return run

    first, second = turns.run(sleeper(0.02), sleeper(0.06))
    assert first.seconds >= 0.04 and second.seconds >= 0.12
    whole = max(first.end, second.end) - first.start
    assert abs(first.seconds + second.seconds - whole) < 0.01


class Wrong(Exception):
    pass


@pytest.mark.parametrize("guilty", ["a", "b"])
@pytest.mark.parametrize("late", [False, True])
def test_the_first_error_ends_both_and_is_raised_with_its_traceback(
    turns: Turns, guilty: str, late: bool
) -> None:
    said: list[str] = []

    def failing() -> None:
        if late:
            turns.hand_over()
        raise Wrong(guilty)

    other = speaker(turns, said, "other", 9)
    both = (failing, other) if guilty == "a" else (other, failing)
    with pytest.raises(Wrong, match=guilty) as caught:
        turns.run(*both)
    assert "in failing" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert len(said) <= 2 and not turns.shared
    ran = turns.run(speaker(turns, said, "c", 1), speaker(turns, said, "d", 1))  # they can be taken again
    assert [r.result for r in ran] == ["c", "d"]


def test_an_error_passes_through_a_backward(turns: Turns) -> None:
    """Of the forward, while the backward has handed over inside autograd."""

    def back(grad: Tensor) -> Tensor:
        turns.hand_over()
        return grad

    def forward() -> None:
        turns.hand_over()
        raise Wrong("forward")

    x = torch.ones(3, requires_grad=True)
    y = linear_map(x, lambda t: t * 1, back).sum()
    with pytest.raises(Wrong, match="forward"):
        turns.run(forward, y.backward)
    assert x.grad is None


def test_both_have_the_modes_of_the_caller(turns: Turns) -> None:
    found: list[bool] = []

    def product() -> None:
        found.append(torch.is_grad_enabled())
        turns.hand_over()
        _ = torch.ones(2, 3) @ torch.ones(3, 4)

    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        turns.run(product, product)
    assert found == [False, False]
    assert flops.get_total_flops() == 2 * 2 * 2 * 3 * 4


class Once(nn.Module):
    """A product whose forward and backward hand over in their middle."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        def pause(t: Tensor) -> Tensor:
            self.turns.hand_over()
            return t * 1

        return linear_map(x @ self.weight, pause, pause) @ self.weight


def gradient_after_turns(kept: bool) -> Any:
    """Of a module that is one FSDP unit: the forward of a second input runs beside the backward of the first.
    kept: whether each has the phases of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from parallel.sharding import whole

    turns = Turns(CPU)
    module = Once(turns)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=False)
    whole.keep(module, True)
    xs = [torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    whole.sum_in_backward(module, False, final=False)
    losses = [module(xs[0]).square().sum()]
    own = whole.Phases([module]) if kept else None
    turns.run(lambda: losses.append(module(xs[1]).square().sum()), losses[0].backward, own)
    turns.close()
    whole.sum_in_backward(module, True, final=True)
    losses[1].backward()
    whole.free(module)
    grad = module.weight.grad
    return None if grad is None else grad.full_tensor().numpy()


def test_fsdp_sums_what_was_computed_in_turns(ranks: Any) -> None:
    plain = Once(Turns(CPU))
    for k in (0, 1):
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        plain(x).square().sum().backward()
    (found,) = ranks(1, gradient_after_turns, True)
    assert plain.weight.grad is not None
    torch.testing.assert_close(torch.from_numpy(found), plain.weight.grad, rtol=1e-12, atol=0)
    # FSDP's own state is one for both: the second forward then leaves out the hooks that sum its gradients.
    assert ranks(1, gradient_after_turns, False) == [None]
