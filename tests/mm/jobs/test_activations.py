"""The activation memory that the checker states is what the real job's autograd graphs keep."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.plan.blueprint import draw_up
from mm.ranks.feed import prepare
from mm.ranks.job import build_job, open_data
from mm.ranks.launch import RankInfo
from mm.train.step import run_step
from parallel.schedule import Kind, Record
from parallel.schedule.checker.memory import Memory, peaks
from tests.mm.harness import CONFIGS, small


class Saved:
    """Bytes of the storages that autograd graphs hold, each counted once, weights left out."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.held: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = 0

    def pack(self, x: Tensor) -> Any:
        at = x.untyped_storage().data_ptr()
        # A gathered weight may be saved as a view of itself; its memory is no activation.
        if any(p.untyped_storage().data_ptr() == at for m in self.modules for p in plain_parameters(m)):
            return x
        self.held[at] += 1
        if self.held[at] == 1:
            self.sizes[at] = x.untyped_storage().nbytes()
            self.total += self.sizes[at]
            self.peak = max(self.peak, self.total)
        return _Holder(x.detach(), at, self)

    def release(self, at: int) -> None:
        self.held[at] -= 1
        if not self.held[at]:
            self.total -= self.sizes[at]


def plain_parameters(module: nn.Module) -> list[Tensor]:
    found = []
    for p in module.parameters():
        found.append(p._local_tensor if hasattr(p, "_local_tensor") else p)
    return found


class _Holder:
    def __init__(self, x: Tensor, at: int, saved: Saved) -> None:
        self.x, self.at, self.saved = x, at, saved

    def __del__(self) -> None:
        self.saved.release(self.at)


def run(raw: dict[str, Any]) -> tuple[dict[tuple[str, int, int], int], int, list[float]]:
    """(bytes that each forward leaves, most bytes held at once, what the checker states of that), here."""
    world, rank = dist.get_world_size(), dist.get_rank()
    blueprint = draw_up(from_mapping(raw, CONFIGS), world)
    job = build_job(blueprint, RankInfo(rank, world, torch.device("cpu")))
    try:
        data = open_data(job, load_index(["data/digits-train-*.tar"], CONFIGS))
        prepared = prepare(0, data.index.samples[:24], data.assembler)
        schedule = blueprint.schedule(prepared.plan.active)
        saved, left, before = Saved(job.modules()), {}, 0

        def observe(record: Record) -> None:
            nonlocal before
            a = record.action
            if a.kind is Kind.FORWARD:
                left[a.module, a.stage, a.microbatch] = saved.total - before
            before = saved.total

        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda h: getattr(h, "x", h)):
            run_step(job, prepared, train=True, observe=observe)
        memory = Memory(
            {(m, s): 1.0 for m, s, _ in left}, load={(m, i): float(n) for (m, _, i), n in left.items()}
        )
        stated = peaks(schedule, memory)[schedule.program_of[rank]].bytes
    finally:
        job.close()
    return left, saved.peak, stated


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1f1b", "gpipe", "three_phase"])
def test_the_stated_peak_is_within_a_tenth_of_what_is_kept(kind: str, ranks: Any) -> None:
    raw = small(
        train={"global_batch": 24},
        layout={"audio": {"ranks": "0-1"}, "llm": {"pp": 2}},
        schedule={"microbatches": 6, "kind": kind},
    )
    found = ranks(4, run, raw)
    alone = ranks(4, run, {**raw, "schedule": {"microbatches": 6, "kind": "sequential"}})
    for (_, peak, stated), (left, least, _) in zip(found, alone, strict=True):
        assert abs(peak - stated) < 0.1 * stated
        assert least < peak and left  # pipelines hold more than one micro-batch
