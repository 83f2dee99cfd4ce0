"""Values of the host on a device, and indices that are copied once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.sequence.host import Indices, to_device
from parallel.sequence.intervals import Rows, join_rows, rows_of

PARTS = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=4), min_size=1, max_size=5
)


def rows(runs: list[tuple[int, int]]) -> Rows:
    start, length = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    return rows_of(start, length)


def listed(some: Rows) -> list[int]:
    return list(range(some.start, some.stop)) if isinstance(some, slice) else some.tolist()


@given(PARTS)
def test_joined_rows_are_those_of_all_parts(parts: list[list[tuple[int, int]]]) -> None:
    given_rows = [rows(p) for p in parts]
    indices = Indices()
    joined = indices.joined(given_rows)
    assert listed(joined) == [n for p in given_rows for n in listed(p)] == listed(join_rows(given_rows))
    assert indices.joined(list(given_rows)) is joined


def test_an_array_is_brought_once() -> None:
    indices, cpu = Indices(), torch.device("cpu")
    a, b = np.array([1, 2]), np.array([3, 4])
    assert indices.on(a, cpu) is indices.on(a, cpu) and indices.on(a, cpu).tolist() == [1, 2]
    assert indices.on(b, cpu).tolist() == [3, 4]


def test_on_the_host_memory_is_shared() -> None:
    values = np.arange(6.0)
    assert to_device(values, "cpu").data_ptr() == values.ctypes.data
    assert to_device(values.reshape(2, 3).T, "cpu").tolist() == values.reshape(2, 3).T.tolist()


def test_elsewhere_the_copy_is_pinned_and_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that this machine lacks only the calls can be seen."""
    calls: list[tuple[str, Any]] = []

    def pin(x: Tensor) -> Tensor:
        calls.append(("pin", None))
        return x

    def to(x: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        calls.append((str(device), non_blocking))
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    to_device(np.arange(3), torch.device("cuda", 1))
    assert calls == [("pin", None), ("cuda:1", True)]
