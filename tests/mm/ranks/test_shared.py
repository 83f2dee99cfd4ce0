"""Memory that a rank shares with its workers: whose it is at any time, and that all of it comes back."""

from __future__ import annotations

import itertools
import os

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.ranks.shared import ALIGN, SharedMemory

SIZE = 1 << 14
KINDS = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


@given(st.lists(st.tuples(st.integers(0, 900), st.sampled_from(KINDS), st.integers(0, 5)), max_size=40))
def test_tensors_that_are_there_share_nothing(wanted: list[tuple[int, torch.dtype, int]]) -> None:
    memory = SharedMemory(SIZE)
    alive: list[torch.Tensor] = []
    for count, dtype, drop in wanted:
        whole = memory.empty((count, 2), dtype)
        assert whole.shape == (count, 2) and whole.dtype == dtype
        alive.append(whole[: count // 2] if count > 1 else whole)  # a part of it keeps all of it
        del whole
        places = [(p, len(one)) for one in alive if one.numel() and (p := memory.place(one)) is not None]
        ends = sorted((at, at + size) for (at, size), _ in places)
        assert all(b <= c for (_, b), (c, _) in itertools.pairwise(ends))
        assert all(at % ALIGN == 0 and at + size <= SIZE for (at, size), _ in places)
        for _ in range(min(drop, len(alive))):
            alive.pop(len(alive) // 2)
    alive.clear()
    all_of_it = memory.empty((SIZE,), torch.uint8)
    assert memory.place(all_of_it) == (0, SIZE)
    assert memory.place(memory.empty((1,), torch.uint8)) is None, "nothing is left, so it is elsewhere"


def test_what_another_process_writes_is_in_the_tensor() -> None:
    memory = SharedMemory(SIZE)
    before, here = memory.empty((3,), torch.float32), memory.empty((2, 5), torch.float32)
    before.fill_(1)
    child = os.fork()
    if child == 0:
        place = memory.place(here[1])
        assert place == (ALIGN + 20, 20)
        memory.write(place[0], torch.arange(5.0).view(torch.uint8).numpy())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(here[1].numpy(), np.arange(5.0)) and before.tolist() == [1, 1, 1]
