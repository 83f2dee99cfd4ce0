"""Data-parallel policies: exact under every schedule, and each holds and moves what its name promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.checkpoint import saver
from mm.checkpoint import state as checkpoint
from mm.plan.data_parallel import Moved, stage_costs
from mm.ranks.feed import Feed
from mm.ranks.job import Job
from mm.train.one_step import train_step
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
from parallel.schedule import Record
from parallel.sharding import whole
from parallel.sharding.rules import FusedAdamW
from tests.mm.harness import Held, largest_difference, running, small, weigh
from tests.slow import on_demand

MODULES = ("vision", "audio", "llm")

# By name: the policies of vision, audio and the language model; their layouts; the schedule. Each policy of
# the language model meets experts, and each but hsdp, which needs two nodes a stage, a pipeline.
JOBS: dict[str, tuple[str, dict[str, dict[str, Any]], dict[str, Any]]] = {
    "1f1b": ("hsdp zero1 zero2", {"llm": {"pp": 2, "ep": 2}}, {"microbatches": 3}),
    "experts over nodes": ("zero1 zero3 hsdp", {"audio": {"cp": 2}, "llm": {"ep": 2}}, {"microbatches": 2}),
    "interleaved": ("zero3 hsdp zero1", {"llm": {"pp": 2, "vpp": 2, "ep": 2}}, {"microbatches": 3}),
    "zero bubble": (
        "zero2 replicate zero3",
        {"llm": {"pp": 2, "tp": 2}, "vision": {"ranks": [3, 1, 2, 0], "tp": 2}},
        {"microbatches": 2, "kind": "zero_bubble"},
    ),
    "zero bubble, held": (
        "zero1 step step",
        {"audio": {"ranks": "0-1"}, "llm": {"pp": 2, "vpp": 2, "ep": 2}},
        {"microbatches": 2, "kind": "zero_bubble"},
    ),
    "fill": ("zero1 step replicate", {"llm": {"pp": 2, "ep": 2}}, {"microbatches": 2, "kind": "fill"}),
    "three phases": (
        "replicate zero2 step",
        {"llm": {"pp": 2, "ranks": [2, 0, 3, 1]}, "vision": {"pp": 2}},
        {"microbatches": 2, "kind": "three_phase"},
    ),
    "disjoint": (
        "zero2 replicate zero2",
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": 0}, "llm": {"ranks": "2-3", "cp": 2}},
        {"microbatches": 3},
    ),
}
# Tied weights, a frozen module and a partly frozen one, and so few samples that ranks have none.
FROZEN = ("experts over nodes", "zero bubble")
BY_LAYER = ("1f1b", "three phases")
RESUMED = {"interleaved", "fill"}


def job_of(name: str, frozen: bool = False) -> dict[str, Any]:
    policies, layout, schedule = JOBS[name]
    given = dict(zip(MODULES, policies.split(), strict=True))
    layout = {m: {**layout.get(m, {}), "data_parallel": given[m]} for m in MODULES}
    raw = model(frozen) | {"layout": layout, "schedule": schedule}
    raw["run"] = {**raw["run"], "node_size": 2}
    raw["train"] = {**raw["train"], "shard": "layer" if name in BY_LAYER else "module"}
    return raw


def model(frozen: bool) -> dict[str, Any]:
    raw = small(train={"global_batch": 5} if frozen else {})
    if frozen:
        raw["model"]["vision"]["freeze"] = "all"
        raw["model"]["audio"]["freeze"] = "encoder"
        raw["model"]["llm"]["tied"] = True
    return raw


SPANS = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0}  # argument that is whole


class Recorder(TorchDispatchMode):
    """Collectives that the c10d dispatcher sees: by group, how many of each, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in SPANS:
            tensor = args[SPANS[func._opname]]
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            counts = self.seen[dist.ProcessGroup.unbox(group).group_name]
            counts[func._opname] += 1
            counts[func._opname + " bytes"] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def moved(job: Job, recorder: Recorder) -> Moved:
    """This rank's messages over data ranks. Modules with the same data ranks share communicators."""
    over = [mesh.data_parallel("dense") for mesh in job.meshes.values()]
    over += [mesh.data_parallel("expert") for mesh in job.meshes.values() if mesh.expert is not None]
    names = {x.get_group(k).group_name for x in over for k in range(x.ndim) if x.size(k) > 1}
    total: Counter[str] = sum((recorder.seen[name] for name in names), Counter())
    return Moved(*(total[key] for name in SPANS for key in (name, name + " bytes")))


def held(job: Job, module: str) -> int:
    """Bytes of the storages of a module's weights, gradients and optimizer state that exist on this rank."""
    found: list[Tensor | None] = []
    for part in job.parts[module].values():
        for unit in (m for m in part.modules() if isinstance(m, FSDPModule)):
            group = unit._get_fsdp_state()._fsdp_param_group
            if group is None:
                continue
            found.append(group._partial_reduce_output)  # summed inside the node
            for p in group.fsdp_params:
                whole = getattr(p, "_unsharded_param", None)
                found += [p.sharded_param, p.sharded_param.grad, *p.all_gather_outputs]
                found += [p.unsharded_accumulated_grad, None if whole is None else whole.grad]
    for rule in job.optimizers[module].rules.values():
        assert isinstance(rule, FusedAdamW)
        found += [s[k] for s in rule.adam.state.values() for k in ("exp_avg", "exp_avg_sq") if s]
    plain = [x._local_tensor if isinstance(x, DTensor) else x for x in found if x is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in plain}.values())


@dataclass(frozen=True)
class Cost:
    """Of one step on a rank: messages over data ranks; by module, bytes at rest and the most in a step."""

    moved: Moved
    held: dict[str, tuple[int, int]]


def second_step(job: Job, feed: Feed) -> tuple[dict[str, Any], Cost]:
    """Its metrics, and what it did; the most bytes that modules hold in it are found on rank 0 only."""
    most: Counter[str] = Counter()

    def observe(record: Record) -> None:
        m = record.action.module  # what the others hold stays as it is
        most[m] = max(most[m], held(job, m)) if m in job.parts else 0

    prepared, _ = feed.next(1, 2)
    with Recorder() as recorder:
        result = run_step(job, prepared, train=True, observe=observe if job.rank.rank == 0 else None)
        update = finish_step(job, result, 1, learning_rate(job.blueprint.cfg.train, 1))
    for part in (part for parts in job.parts.values() for part in parts.values()):
        whole.wait(part)  # the update has started gathers
    subsets = prepared.plan.subsets
    said = {f"loss_by_{by}": subsets.losses(update.losses, by) for by in ("modality", "source")}
    metrics = {**asdict(update), "loss": update.loss, **said}
    return metrics, Cost(moved(job, recorder), {m: (held(job, m), most[m]) for m in job.parts})


def stated(job: Job) -> Cost:
    """What the plan says of this rank."""
    blueprint, total, held_by = job.blueprint, Moved(), {}
    for m in job.parts:
        cost = stage_costs(blueprint, m, blueprint.layouts[m].coord(job.rank.rank).pp)
        found = cost[blueprint.policies[m]]
        total, held_by[m] = total + found.moved, (found.rest, found.step)
    return Cost(total, held_by)


@dataclass(frozen=True)
class Trial:
    """Of one job on a rank. weights: after the second of its steps."""

    steps: list[dict[str, Any]]
    weights: Held
    stated: Cost
    did: Cost


def try_jobs(raws: dict[str, dict[str, Any]], folder: str) -> dict[str, Trial]:
    """Each trains two steps. Those of RESUMED then continue the job before, which has saved and goes on."""
    out: dict[str, Trial] = {}
    names, path = list(raws), Path(folder)
    for k, (name, raw) in enumerate(raws.items()):
        saves, loads = not RESUMED.isdisjoint(names[k + 1 : k + 2]), k > 0 and name in RESUMED
        with running(raw) as (job, feed):
            first = asdict(train_step(job, feed, 0))
            second, did = second_step(job, feed)
            weights, metrics = weigh(job), [first, second]
            if loads:
                checkpoint.load(job, feed.index, path)
            if saves:
                path = saver.save(job, feed.index, Path(folder, str(k)), 2, feed.bad)
            if loads or saves:
                metrics.append(asdict(train_step(job, feed, 2)))
            out[name] = Trial(metrics, weights, stated(job), did)
    return out


def assert_learnt(
    trial: Trial, metrics: list[dict[str, Any]], weights: dict[str, np.ndarray], name: str
) -> None:
    """Metrics, and weights after the second step, are those of one process."""
    assert largest_difference(trial.steps, metrics[: len(trial.steps)]) < 1e-9, name
    for key, (index, value) in trial.weights.items():
        part = weights[key][np.ix_(*index)] if index else weights[key]
        np.testing.assert_allclose(value, part, rtol=1e-9, atol=1e-10, err_msg=f"{name}: {key}")


def assert_as_stated(trial: Trial, raw: dict[str, Any], name: str) -> None:
    assert trial.did.moved == trial.stated.moved, name
    for m, (rest, step) in trial.stated.held.items():
        # The first half of a split backward makes some gradients.
        split = m == "llm" and raw["schedule"].get("kind") == "zero_bubble"
        assert trial.did.held[m][0] == rest, (name, m)
        assert trial.did.held[m][1] == (pytest.approx(step, rel=0.1) if split else step), (name, m)


def one_process(raw: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Metrics of three steps, and the weights after two."""
    with running(raw) as (job, feed):
        metrics = [asdict(train_step(job, feed, step)) for step in (0, 1)]
        weights = {name: value for name, (_, value) in weigh(job).items()}
        return [*metrics, asdict(train_step(job, feed, 2))], weights


@pytest.mark.parametrize("frozen", on_demand([False, True], [False]))
def test_every_policy_learns_what_one_process_learns_at_its_price(
    frozen: bool, ranks: Any, tmp_path: Path
) -> None:
    """Through checkpoints of other policies too. Rank 0 has the largest shards."""
    ((metrics, held),) = ranks(1, one_process, model(frozen))
    raws = {name: job_of(name, frozen) for name in (FROZEN if frozen else JOBS)}
    by_rank = ranks(4, try_jobs, raws, str(tmp_path), timeout=240)
    for name, raw in raws.items():
        for found in by_rank:
            assert_learnt(found[name], metrics, held, name)
        if not frozen:
            assert_as_stated(by_rank[0][name], raw, name)


@pytest.mark.slow
def test_the_price_in_two_dtypes(ranks: Any, tmp_path: Path) -> None:
    """Weights are gathered in bfloat16, gradients summed in float32."""
    raw = job_of("zero bubble")
    raw["train"]["dtype"] = "bfloat16"
    assert_as_stated(ranks(4, try_jobs, {"bfloat16": raw}, str(tmp_path))[0]["bfloat16"], raw, "bfloat16")
