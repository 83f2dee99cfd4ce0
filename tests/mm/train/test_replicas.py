"""Copies of weights are equal bit for bit in any layout, and a flipped bit is found, with its rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.errors import ReplicasDiffer
from mm.train.one_step import train_step
from mm.train.replicas import check_replicas, difference, hashed
from parallel.sharding import whole
from parallel.sharding.param import declared, local
from tests.mm.harness import running, small
from tests.slow import on_demand

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"vision": {"data_parallel": "replicate"}},
    "tp with sequence parallelism, experts": {
        "vision": {"tp": 2},
        "llm": {"tp": 2, "ep": 4, "sequence_parallel": True},
    },
    "ends of a pipeline, sharded": {
        "audio": {"ranks": "0-2", "data_parallel": "zero3"},
        "llm": {"pp": 2, "data_parallel": "zero3"},
    },
    "cp": {"vision": {"data_parallel": "replicate"}, "llm": {"cp": 2, "tp": 2, "data_parallel": "replicate"}},
}
# By layout: a module, part of a name, the rank whose bit flips, and what is said.
FLIPS = {
    "data": ("vision", "", 2, "rank 2 differs from ranks 0, 1, 3, which agree,"),
    "tp with sequence parallelism, experts": ("llm", "norm", 1, "rank 0 and rank 1 differ, and no majority"),
    "ends of a pipeline, sharded": ("llm", "embed", 3, "no majority says which is right"),
    "cp": ("llm", "q", 3, "rank 1 and rank 3 differ, and no majority"),
}


def flipped(raw: dict[str, Any], module: str, name: str, rank: int) -> tuple[str, str]:
    """What is said after two steps, and after a bit of a weight has flipped on one rank."""
    with running(raw) as (job, feed):
        said = []
        for step in range(2):
            train_step(job, feed, step)
            said.append(compared(job, step + 1))
        if job.rank.rank == rank:
            part = job.parts[module][max(job.parts[module])]
            whole.free(part)
            named = [(n, local(p.detach())) for n, p, _ in declared(part) if name in n]
            value = next(v for _, v in named if v.numel())
            value.view(-1)[-1:].view(torch.int64).bitwise_xor_(1 << 63)
        return "".join(said), compared(job, 3)


def compared(job: Any, step: int) -> str:
    try:
        check_replicas(job, step)
    except ReplicasDiffer as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", on_demand(LAYOUTS, ["tp with sequence parallelism, experts", "cp"]))
def test_copies_are_equal_until_a_bit_flips(ranks: Any, layout: str) -> None:
    module, name, rank, told = FLIPS[layout]
    raw = small(layout=LAYOUTS[layout])
    raw["model"]["llm"]["tied"] = True
    found = ranks(4, flipped, raw, module, name, rank, timeout=100)
    assert [before for before, _ in found] == [""] * 4
    assert len({after for _, after in found}) == 1
    assert told in found[0][1] and f"of module {module}" in found[0][1], found[0][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_change_of_one_bit_changes_the_hash(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (1, 1023, 1024, 2600):
        tensor = torch.randn(n, generator=draw).mul(9).to(dtype)
        bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        before, size = hashed(tensor).item(), 8 * tensor.element_size()
        for at in (0, n // 2, n - 1):
            for bit in (0, size // 2, size - 1):
                flip = 1 << bit if bit < size - 1 else -(1 << bit)
                bits[at] ^= flip
                assert hashed(tensor).item() != before
                bits[at] ^= flip
        assert hashed(tensor).item() == before
        if n > 1:
            assert hashed(tensor.flip(0)).item() != before


def test_the_fewer_are_named() -> None:
    same, other = {"m 0 ": {"m.a": "1", "m.b": "2"}}, {"m 0 ": {"m.a": "1", "m.b": "3"}}
    assert "rank 1 differs from ranks 0, 3, which agree, in their copies of m.b, of module m" in difference(
        [same, other, {}, same]
    )
    assert "rank 0 and rank 2 differ, and no majority" in difference([same, {}, other])
