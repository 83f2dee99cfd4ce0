"""The recorder of host waits sees what makes a host wait for its device, in forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.comm.linear_map import linear_map
from parallel.sequence.host import to_device
from tests.host_waits import HostWaits

X = torch.arange(6.0)
COUNTS = torch.tensor([1, 2, 3])
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X[0]),
    "if": lambda: bool(X[0] > 1),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 2],
    "set by a mask": lambda: X.clone().__setitem__(X > 2, torch.ones(3)),
    "masked_select": lambda: X.masked_select(X > 2),
    "unique": lambda: COUNTS.unique(),
    "bincount": lambda: torch.bincount(COUNTS),
    "one_hot": lambda: torch.nn.functional.one_hot(COUNTS),
    "repeat_interleave": lambda: COUNTS.repeat_interleave(COUNTS),
    "where": lambda: torch.where(X > 2),
    "a list as index": lambda: X[[0, 2]],
    "a list as index of a part": lambda: X.view(2, 3).__setitem__((slice(None), [0, 2]), 0.0),
    "a tensor of a list": lambda: torch.tensor([1.0, 2.0]),
    "a tensor of an array": lambda: torch.from_numpy(np.zeros(3)),
}
WAITLESS: dict[str, Callable[[], Any]] = {
    "repeat_interleave with its size": lambda: COUNTS.repeat_interleave(COUNTS, output_size=6),
    "numbers as index": lambda: X[COUNTS],
    "set by numbers": lambda: X.clone().__setitem__(COUNTS, 0.0),
    "slices": lambda: X[1:3],
    "argsort": lambda: X.argsort(stable=True),
    "where of three": lambda: torch.where(X > 2, X, 0.0),
    "scatter_add": lambda: X.new_zeros(4).scatter_add_(0, COUNTS, X[:3]),
    "arange": lambda: torch.arange(3),
    "an array on its way to the device": lambda: to_device(np.zeros(3), "cpu"),
}


def waits(do: Callable[[], Any]) -> int:
    with HostWaits() as found:
        do()
    return len(found.places)


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name: str) -> None:
    assert waits(WAITS[name]) >= 1


@pytest.mark.parametrize("name", WAITLESS)
def test_no_other_is(name: str) -> None:
    assert not waits(WAITLESS[name])


def test_a_backward_is_seen_and_the_line_is_ours() -> None:
    def back(grad: Tensor) -> Tensor:
        return grad * sum(grad.tolist())

    x = X.clone().requires_grad_()
    with HostWaits() as found:
        loss = linear_map(x, torch.clone, back).sum()
        assert not found.places
        torch.autograd.backward(loss)
    (place,) = found.places
    assert (place.file, place.function, place.operator) == (
        "parallel/comm/linear_map.py",
        "backward",
        "tolist",
    )


def test_other_threads_are_their_own() -> None:
    with HostWaits() as found, ThreadPoolExecutor(1) as pool:
        assert pool.submit(X.tolist).result() == X.tolist()
    assert len(found.places) == 1
    X.tolist()
    assert len(found.places) == 1  # nor what comes after
