"""Tensors pass from any layout to any other in memory, to the bit, with least bytes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.checkpoint import BadCheckpoint, Handover, hold
from parallel.comm.transport import Channel
from parallel.sharding.param import local


class Layout(NamedTuple):
    """A grid of ranks, and the dim that each of its axes shards, None for none."""

    grid: list[int]
    ranks: list[int]
    dims: list[int | None]


class Move(NamedTuple):
    shape: tuple[int, ...]
    leaves: Layout
    enters: Layout
    theirs: str
    ours: str


def channel(timeout_s: float = 20.0) -> Channel:
    group = dist.group.WORLD
    assert group is not None
    return Channel("weights in memory", group, timeout_s)


def placed(name: str, whole: Tensor, layout: Layout, meshes: dict[str, DeviceMesh]) -> dict[str, Tensor]:
    """This rank's shard of a tensor, by its name; empty where it has none. meshes: those made so far."""
    grid, ranks, dims = layout
    if dist.get_rank() not in ranks:
        return {}
    if (key := str(layout[:2])) not in meshes:  # one takes 10 ms
        meshes[key] = DeviceMesh("cpu", torch.tensor(ranks).view(grid), _init_backend=False)
    where: list[Placement] = [Replicate() if d is None else Shard(d) for d in dims]
    shard = whole
    for axis, dim in enumerate(dims):
        if dim is not None:
            parts = torch.chunk(shard, grid[axis], dim)
            at = [ranks.index(dist.get_rank()) // grid[1], ranks.index(dist.get_rank()) % grid[1]][axis]
            shard = parts[at] if at < len(parts) else shard.narrow(dim, 0, 0)
    size, stride = whole.shape, whole.stride()
    return {
        name: DTensor.from_local(
            shard.clone(), meshes[key], where, run_check=False, shape=size, stride=stride
        )
    }


LAYOUTS: list[tuple[list[int], list[int]]] = [
    ([2, 2], [3, 1, 0, 2]),
    ([4, 1], [0, 1, 2, 3]),
    ([1, 2], [2, 1]),
    ([3, 1], [1, 3, 0]),
]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Layout:
    grid, ranks = draw(st.sampled_from(LAYOUTS))
    free: list[int | None] = [None, *range(len(shape))]
    first = draw(st.sampled_from(free))
    second = draw(st.sampled_from([d for d in free if d is None or d != first]))
    return Layout(grid, ranks, [first, second])


@st.composite
def moves(draw: st.DrawFn) -> Move:
    """The shape of a tensor, the layout that it leaves and the one that it enters, and their dtypes."""
    shape = draw(st.sampled_from([(), (7,), (8, 4), (5, 3, 2), (0, 4), (1, 9)]))
    kinds = draw(st.sampled_from([("float64", "float64"), ("float32", "float64"), ("bfloat16",) * 2]))
    return Move(shape, draw(layouts(shape)), draw(layouts(shape)), *kinds)


def moved(moves: list[Move], message_bytes: int) -> None:
    meshes: dict[str, DeviceMesh] = {}
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for i, move in enumerate(moves):
        n = math.prod(move.shape)
        whole = torch.arange(1.0, n + 1, dtype=getattr(torch, move.theirs)).view(move.shape)
        entered = whole.to(getattr(torch, move.ours))
        old |= placed(f"t{i}", whole, move.leaves, meshes)
        new |= placed(f"t{i}", torch.full_like(entered, -1), move.enters, meshes)
        expected |= placed(f"t{i}", entered, move.enters, meshes)
    there = Handover(hold(old), channel(), torch.device("cpu"), message_bytes=message_bytes)
    assert there.fill(old) == 0  # each rank holds all that it needs
    received = there.fill(new)
    parts = least = 0
    for name, tensor in new.items():
        assert torch.equal(local(tensor), local(expected[name])), (name, moves)
        had = set(local(old[name]).flatten().tolist()) if name in old else set()
        lacked = len({*local(expected[name]).flatten().tolist()} - had)  # each element has its own value
        parts += lacked
        least += lacked * there.shapes[name][1].itemsize
    assert least <= received <= least + 15 * parts, (received, least)


def test_any_layout_enters_any_other(ranks: Any) -> None:
    found: list[Move] = []

    @settings(max_examples=100, database=None)
    @given(moves())
    def collect(move: Move) -> None:
        found.append(move)

    collect()
    ranks(4, moved, found, 64)
    ranks(4, moved, found, 1 << 20)


def with_one_that_stays_away() -> str:
    if dist.get_rank() == 1:
        return ""
    try:
        Handover(hold({}), channel(1.0), torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_rank_that_does_not_answer_is_named(ranks: Any) -> None:
    assert "weights in memory: no answer from rank 1 within 1 s" in ranks(2, with_one_that_stays_away)[0]


def what_is_missing() -> list[str]:
    there = Handover(hold({"a": torch.zeros(2)}), channel(), torch.device("cpu"))
    out = []
    for wanted in ({"b": torch.zeros(2)}, {"a": torch.zeros(3)}):
        with pytest.raises(BadCheckpoint) as caught:
            there.fill(wanted)
        out.append(str(caught.value))
    return out


def test_what_does_not_fit_is_named(ranks: Any) -> None:
    assert ranks(1, what_is_missing)[0] == [
        "what is in memory does not fit: lacks 1 tensors of this model, first b; it has 1 others, first a",
        "what is in memory does not fit: 1 tensors have another shape: "
        "a has shape (2,), this model needs (3,)",
    ]
