"""Small jobs on four gloo ranks whose steps tell what Python, dispatch and messages cost on this machine.

    torchrun --nproc-per-node 4 -m mm.predict.reference OUT.json

doctor --calibrate starts this. Their samples are made up, and their model is none that is shipped. The jobs
differ in how many operations, bytes and messages a step has, so that each can be told from the others.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.config.schema import Config, from_mapping
from mm.data.sample import Part, Sample
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.inputs import EncoderUse
from mm.plan.made_up import made_up_index
from mm.plan.step_plan import StepPlan
from mm.predict.timed import Spent, everywhere, timed_step
from mm.ranks.feed import read_step
from mm.ranks.job import build_job, open_data
from mm.ranks.launch import RankInfo, init_distributed
from mm.train.garbage import set_aside
from mm.virtual.run import first_plan
from mm.virtual.samples import VirtualAssembler

WORLD = 4
STEPS = 4
MODEL: dict[str, Any] = {
    "vision": {
        "encoder": "vit",
        "projector": {"hidden": 128},
        "options": {"patch": 4, "width": 80, "heads": 4, "layers": 5, "mlp": 240, "max_grid": 32},
    },
    "llm": {
        "pattern": "*ME-M",
        "d_model": 160,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 20,
        "mamba_heads": 8,
        "mamba_head_dim": 40,
        "mamba_state": 16,
        "mamba_groups": 4,
        "n_experts": 4,
        "top_k": 2,
        "expert_ffn": 128,
        "shared_ffn": 160,
        "mlp_ffn": 480,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"vision": {}, "llm": {}},
    "tensor": {"vision": {"tp": 4}, "llm": {"tp": 4}},
    "half": {"vision": {"tp": 2}, "llm": {"tp": 2, "ep": 2, "sequence_parallel": True}},
    "pipeline": {"vision": {}, "llm": {"pp": 2}},
    "apart": {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3"}},
}
# Layout, micro-batches, tokens of a sample and samples of a step.
JOBS = (
    ("data", 1, 96, 8),
    ("data", 1, 1024, 8),
    ("tensor", 1, 96, 8),
    ("tensor", 1, 1024, 8),
    ("half", 2, 256, 8),
    ("pipeline", 4, 128, 8),
    ("apart", 2, 256, 8),
)


@dataclass(frozen=True)
class Timed:
    """A job as it was timed: its number in JOBS; seconds of a step, medians."""

    job: int
    wall: float
    processor: float


@dataclass(frozen=True)
class Messages:
    """Gloo alone, on two or four ranks, seconds. latency: wall, of a small message one way. rate: bytes/s of
    large ones. message, byte: of the processor, at each end."""

    ranks: int
    latency: float
    rate: float
    message: float
    byte: float


def blueprint_of(number: int) -> Blueprint:
    """A job of JOBS."""
    layout, microbatches, context, samples = JOBS[number]
    raw = {
        "run": {"nproc": WORLD, "node_size": WORLD, "device": "cpu"},
        "model": MODEL,
        "layout": {m: {"ranks": "all", **x} for m, x in LAYOUTS[layout].items()},
        "schedule": {"microbatches": microbatches},
        "data": {"train": ["none-*.tar"], "context": context},
        "train": {"global_batch": samples, "dtype": "float32", "steps": STEPS + 1},
    }
    return draw_up(from_mapping(raw, Path()), WORLD)


def plan_of(blueprint: Blueprint) -> StepPlan:
    """Its step, of made-up samples."""
    return first_plan(blueprint, made_up_index(blueprint))


class _Assembler(VirtualAssembler):
    """Reads nothing: items are noise."""

    def _prepared(self, use: EncoderUse, sample: Sample, part: Part, out: Tensor | None = None) -> Tensor:
        return torch.rand(super()._prepared(use, sample, part).shape)


def timed(number: int, rank: RankInfo) -> Timed:
    """Run a job; the first step, which pays for caches, is left out."""
    blueprint = blueprint_of(number)
    plan, job = plan_of(blueprint), build_job(blueprint, rank)
    assembler = _Assembler.of(open_data(job, made_up_index(blueprint)).assembler)
    spent: list[Spent] = []
    with set_aside():
        for step in range(STEPS + 1):
            spent.append(timed_step(job, step, lambda: read_step(plan, assembler)))
    job.close()
    gc.collect()
    return Timed(number, median(s.wall for s in spent[1:]), median(s.processor for s in spent[1:]))


def messages(ranks: int) -> Messages | None:
    """Time messages among the first `ranks` ranks; None on the others. Every rank calls this."""
    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() >= ranks:
        return None
    small, large = torch.zeros(16), torch.zeros(1 << 20)
    wall_small, cpu_small = _there_and_back(small, group, 200)
    wall_large, cpu_large = _there_and_back(large, group, 6)
    size = large.numel() * large.element_size()
    byte = max(0.0, cpu_large - cpu_small) / size
    return Messages(ranks, wall_small, size / max(1e-9, wall_large - wall_small), cpu_small, byte)


def _there_and_back(x: Tensor, group: dist.ProcessGroup, times: int) -> tuple[float, float]:
    """(wall seconds one way, processor seconds at each end) of messages between pairs of ranks at once."""
    rank = dist.get_rank()
    peer = rank ^ 1
    found = []
    for number in range(times + 2):
        dist.barrier(group)
        start, process = time.perf_counter(), time.process_time()
        for _ in range(4):
            for sends in (rank < peer, rank > peer):
                if sends:
                    dist.send(x, peer, group=group)
                else:
                    dist.recv(x, peer, group=group)
        if number > 1:
            found.append((time.perf_counter() - start, time.process_time() - process))
    return median(w for w, _ in found) / 8, median(p for _, p in found) / 8


def main() -> None:
    cfg: Config = blueprint_of(0).cfg
    rank = init_distributed(cfg)
    try:
        gloo = [m for n in (2, WORLD) for m in everywhere(messages(n))[:1] if m is not None]
        found = []
        for number, (layout, *_) in enumerate(JOBS):
            found.append(timed(number, rank))
            if rank.rank == 0:
                one = found[-1]
                what = f"{one.wall * 1e3:.0f} ms a step, processor {one.processor * 1e3:.0f} ms"
                print(f"  job {number + 1} of {len(JOBS)}, {layout}: {what}", flush=True)
        if rank.rank == 0:
            out = {"messages": [asdict(m) for m in gloo], "jobs": [asdict(t) for t in found]}
            Path(sys.argv[1]).write_text(json.dumps(out))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
