"""The virtual rank beside the real one: what it says of memory and bytes is what four gloo ranks do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm.config.schema import from_mapping
from mm.plan.blueprint import Blueprint, draw_up
from mm.ranks.feed import prepare
from mm.ranks.job import build_job, open_data
from mm.ranks.launch import RankInfo
from mm.virtual.recorder import Recorder
from mm.virtual.records import Trace
from mm.virtual.run import first_plan, group_names, record_step, virtual_rank
from mm.virtual.samples import virtual_data
from tests.mm.harness import CONFIGS, small
from tests.slow import on_demand

CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated, every degree but ep": {
        "vision": {"cp": 2},
        "audio": {"tp": 2, "sequence_parallel": True},
        "llm": {"tp": 2, "pp": 2, "sequence_parallel": True},
    },
    "mixed": {"audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "cp": 2}},
}


def blueprint_of(layout: dict[str, Any], world: int) -> Blueprint:
    raw = small(layout=layout, schedule={"microbatches": 2}, train={"dtype": "float32"})
    return draw_up(from_mapping(raw, CONFIGS), world)


def recorded(layout: dict[str, Any]) -> list[Trace]:
    """Two real steps of this rank, with the same recorder; each as if it were the first."""
    world = dist.get_world_size()
    blueprint = blueprint_of(layout, world)
    index = virtual_data(blueprint).index
    job = build_job(blueprint, RankInfo(dist.get_rank(), world, CPU))
    names, assembler = group_names(job), open_data(job, index).assembler
    samples = [index.samples[i] for i in first_plan(blueprint, index).sample_ids]
    recorders = [
        Recorder(CPU, dist.get_rank(), values=None, names=lambda g: names[g.group_name]) for _ in range(2)
    ]
    for recorder in recorders:
        with recorder:
            record_step(job, recorder, lambda: prepare(0, samples, assembler))
    job.close()
    return [recorder.trace(world, ()) for recorder in recorders]


@pytest.mark.parametrize("name", on_demand(LAYOUTS, LAYOUTS))
def test_memory_and_bytes_are_those_of_four_real_ranks(ranks: Callable[..., list[Any]], name: str) -> None:
    real: list[list[Trace]] = ranks(4, recorded, LAYOUTS[name])
    blueprint = blueprint_of(LAYOUTS[name], 4)
    for r, (theirs, again) in enumerate(real):
        # FSDP's storages for whole weights are there from the first step on, and change their sizes.
        for kind, size in theirs.memory.by_kind.items():
            assert again.memory.by_kind[kind] == pytest.approx(size, abs=1024), (r, kind)
        ours = virtual_rank(blueprint, r, CPU, data=virtual_data(blueprint))
        assert ours.memory.peak == pytest.approx(theirs.memory.peak, rel=0.02), (r, ours.memory)
        for kind in ("parameters", "optimizer"):
            assert ours.memory.by_kind[kind] == theirs.memory.by_kind[kind]
        assert [(c.op, c.group, c.members, c.bytes, c.dtype, c.during) for c in ours.calls] == [
            (c.op, c.group, c.members, c.bytes, c.dtype, c.during) for c in theirs.calls
        ]
        assert ours.flops_by_module == theirs.flops_by_module
