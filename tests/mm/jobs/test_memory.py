"""What a job keeps: every tensor goes at its last use, and the checker's bound is what is alive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.config.outline import SINK
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.ranks.feed import prepare
from mm.ranks.job import build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.step import run_step
from parallel.schedule import Kind, Record
from parallel.schedule.checker.memory import Memory, peaks
from tests.mm.harness import CONFIGS, small
from tests.slow import on_demand

MICROBATCHES = 12


class Storages(TorchDispatchMode):
    """Storages of all tensors that operations have made since this mode began, while they live."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.modules = modules

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in plain((args, kwargs))}
        for storage in (x.untyped_storage() for x in plain(out)):
            if storage._cdata not in given:  # else a view, perhaps of what was there before
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def total(self) -> int:
        """Bytes alive, weights and their gradients left out."""
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        weights = {x.untyped_storage()._cdata for x in self._weights()}
        return sum(n for k, (_, n) in self.alive.items() if k not in weights)

    def _weights(self) -> Iterator[torch.Tensor]:
        """Whole and sharded weights and their gradients, as FSDP has them."""
        for module in (m for part in self.modules for m in part.modules() if isinstance(m, FSDPModule)):
            group = module._get_fsdp_state()._fsdp_param_group
            for param in group.fsdp_params if group is not None else ():
                whole = getattr(param, "_unsharded_param", None)
                found = [whole, param.sharded_param, param.unsharded_accumulated_grad]
                found += [x.grad for x in found[:2] if x is not None]
                found += param.all_gather_outputs
                for x in found:
                    if x is not None:
                        yield x._local_tensor if isinstance(x, DTensor) else x


def plain(tree: Any) -> list[torch.Tensor]:
    """The tensors in a tree that have a storage of their own."""
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]


def watch(raw: dict[str, Any], train: bool) -> tuple[list[tuple[str, int]], float]:
    """On this rank: (action, bytes alive after it) of a step whose micro-batches are alike, and the most that
    the checker states, from the sizes of one activation and of one message."""
    world, rank = dist.get_world_size(), dist.get_rank()
    blueprint = draw_up(from_mapping(raw, CONFIGS), world)
    job = build_job(blueprint, RankInfo(rank, world, torch.device("cpu")))
    data = open_data(job, open_index(blueprint, blueprint.cfg.data.train, CONFIGS))
    seen: list[tuple[str, int]] = []
    left: dict[str | tuple[str, int], float] = {}

    def observe(record: Record) -> None:
        now, a = alive.total(), record.action
        if a.kind is Kind.FORWARD:
            left.setdefault((a.module, a.stage), float(now - (seen[-1][1] if seen else 0)))
        seen.append((str(a), now))

    try:
        prepared = prepare(0, list(data.index.samples[:2]) * MICROBATCHES, data.assembler)
        alive = Storages(job.modules())
        with alive:
            run_step(job, prepared, train=train, observe=observe)
        schedule = blueprint.schedule(prepared.plan.active, train=train)
        width, mb = blueprint.llm.d_model * 8, prepared.micro[0]
        tokens = 0 if mb.llm is None else len(mb.llm.ids)
        memory = Memory(
            left,
            hidden={(SINK, s): tokens * width for s in range(1, len(blueprint.stages[SINK]))},
            held={e: p.forward.rows_in * width * len(blueprint.edges[e]) for e, p in mb.edges.items()},
            read={e: p.forward.rows_out * width * len(blueprint.edges[e]) for e, p in mb.edges.items()},
        )
        stated = peaks(schedule, memory)[schedule.program_of[rank]]
    finally:
        data.assembler.reader.close()
        job.close()
    return seen, stated.bytes


def job_of(case: str, kind: str = "auto") -> dict[str, Any]:
    layout = {"vision": {"ranks": 0}, "audio": {"ranks": 0}, "llm": {"ranks": "1-2", "pp": 2}}
    raw = small(layout=layout, schedule={"microbatches": MICROBATCHES, "kind": kind})
    raw["train"]["global_batch"] = 2 * MICROBATCHES
    if case == "levels":
        raw["model"]["vision"]["options"] |= {"levels": [0]}
        raw["model"]["llm"]["level_layers"] = [3]
    if case == "frozen encoders":
        for m in ("vision", "audio"):
            raw["model"][m]["freeze"] = "all"
    return raw


@pytest.mark.parametrize(
    ("case", "kind"),
    on_demand(
        [("all learn", "1f1b"), ("levels", "gpipe"), ("frozen encoders", "1f1b"), ("evaluation", "1f1b")],
        [("all learn", "1f1b"), ("frozen encoders", "1f1b")],
        several=True,
    ),
)
def test_what_is_alive_at_each_action_is_what_the_checker_states(case: str, kind: str, ranks: Any) -> None:
    for seen, stated in ranks(3, watch, job_of(case, kind), case != "evaluation"):
        peak = max(n for _, n in seen)
        assert abs(peak - stated) <= 0.1 * stated, (case, seen[:4], peak, stated)


def test_nothing_gathers_over_the_step(ranks: Any) -> None:
    """After the last action a rank has no more than a few messages under way, however many there were."""
    for case in ("frozen encoders", "evaluation"):
        for seen, _ in ranks(3, watch, job_of(case), case != "evaluation"):
            early, late = seen[len(seen) // 2][1], seen[-1][1]
            assert late <= 1.1 * early + 64, (case, early, late)
