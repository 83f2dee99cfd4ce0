"""Which payloads a rank reads: those that it computes from, once each, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.config.schema import from_mapping
from mm.data.reader import ShardReader
from mm.data.sample import Part, Sample
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.step_plan import Microbatch, plan_step
from mm.ranks.batch import Assembler
from mm.ranks.job import assembler_of
from mm.ranks.launch import RankInfo
from parallel.sequence.intervals import shares
from tests.mm.harness import CONFIGS, _index, small
from tests.mm.jobs.test_laws import NAMED
from tests.mm.plan.test_step_plan import axes_at
from tests.slow import on_demand

Place = tuple[str, int]
OFTEN = {"encoders cp tp pp", "llm cp pp"}
MICROBATCHES = 3


class Counting(ShardReader):
    """A reader that remembers what it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Place] = []

    def read(self, sample: Sample, part: Part) -> bytes:
        self.seen.append((part.shard, part.offset))
        return super().read(sample, part)


def needed(made: Blueprint, mb: Microbatch, rank: int) -> list[Place]:
    """What a rank computes from, by brute force over rows."""
    found = []
    for module, use in made.inputs.encoders.items():
        layout = use.layout
        if rank not in layout.ranks or layout.coord(rank).pp > 0:
            continue
        at = layout.coord(rank)
        items = mb.edges[module].items_on(at.dp)
        owner = [k for k, item in enumerate(items) for _ in range(made.inputs.rows(module, item.part))]
        if use.cls.context_parallel:
            start, stop = shares(len(owner), layout.cp)[at.cp]
            owner = owner[start:stop]
            if use.cls.tensor_parallel and layout.sequence_parallel:
                start, stop = shares(len(owner), layout.tp)[at.tp]
                owner = owner[start:stop]
        found += [items[k].part for k in sorted(set(owner))]
    llm = made.inputs.llm
    if rank in llm.ranks and llm.coord(rank).pp in (0, llm.pp - 1):
        found += [mb.sample(j).json for j in mb.samples_of(llm.coord(rank).dp)]
    return sorted((part.shard, part.offset) for part in found)


@pytest.mark.parametrize("name", on_demand(NAMED, NAMED.keys() - OFTEN))
def test_a_rank_reads_what_it_computes_from_and_nothing_else(name: str) -> None:
    world, layout = NAMED[name]
    raw: dict[str, Any] = small(layout=layout, schedule={"microbatches": MICROBATCHES})
    made = draw_up(from_mapping(raw, CONFIGS), world)
    plan = plan_step(2, _index(made).samples[40:48], made.inputs)
    for rank in range(world):
        axes = {m: axes_at(own, rank) for m, own in made.layouts.items() if rank in own.ranks}
        reader = Counting()
        assembler: Assembler = assembler_of(made, RankInfo(rank, world, torch.device("cpu")), axes)
        object.__setattr__(assembler, "reader", reader)
        for mb, boundary in zip(plan.microbatches, assembler.boundary(plan), strict=True):
            reader.seen.clear()
            part = assembler.build(mb, plan.counts, [], boundary)
            assert part is not None
            assert sorted(reader.seen) == needed(made, mb, rank), (rank, mb.index)
        reader.close()
