"""Data-parallel policies: exact under every schedule, and each holds and moves what its name promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
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

from mm.checkpoint import state as checkpoint
from mm.plan.data_parallel import Moved, policy_costs
from mm.ranks.job import Job
from mm.train.step import run_step
from mm.train.trainer import train_step
from mm.train.update import finish_step
from parallel.schedule import Record
from parallel.topology.data_parallel import POLICIES
from tests.mm.harness import Held, largest_difference, running, small, train_and_weigh

MODULES = ("vision", "audio", "llm")

# By name: the policies of vision, audio and the language model; their layouts; the schedule.
JOBS: dict[str, tuple[str, dict[str, dict[str, Any]], dict[str, Any]]] = {
    "1f1b": ("hsdp zero1 zero2", {"llm": {"pp": 2}}, {"microbatches": 3}),
    "interleaved": ("zero3 hsdp zero1", {"llm": {"pp": 2, "vpp": 2, "ep": 2}}, {"microbatches": 4}),
    "zero bubble": (
        "zero2 replicate zero3",
        {"llm": {"pp": 2, "tp": 2}, "vision": {"ranks": [3, 1, 2, 0], "tp": 2}},
        {"microbatches": 3, "kind": "zero_bubble"},
    ),
    "zero bubble, held": (
        "zero1 step step",
        {"audio": {"ranks": "0-1"}, "llm": {"pp": 2, "vpp": 2}},
        {"microbatches": 4, "kind": "zero_bubble"},
    ),
    "fill": ("zero1 step replicate", {"llm": {"pp": 2}}, {"microbatches": 4, "kind": "fill"}),
    "three phases": (
        "replicate zero2 step",
        {"llm": {"pp": 2, "ranks": [2, 0, 3, 1]}, "vision": {"pp": 2}},
        {"microbatches": 3, "kind": "three_phase"},
    ),
    "experts over nodes": ("zero1 zero3 hsdp", {"audio": {"cp": 2}, "llm": {"ep": 2}}, {"microbatches": 3}),
    "experts apart": ("step zero2 replicate", {"llm": {"tp": 2, "ep": 2}}, {"microbatches": 2}),
    "disjoint": (
        "zero2 replicate zero2",
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": 0}, "llm": {"ranks": "2-3", "cp": 2}},
        {"microbatches": 3},
    ),
}
# Tied weights, a frozen module and a partly frozen one, and so few samples that ranks have none.
FROZEN = ("1f1b", "zero bubble", "experts over nodes")


def job_of(name: str, frozen: bool, by_layer: bool = False) -> dict[str, Any]:
    policies, layout, schedule = JOBS[name]
    given = dict(zip(MODULES, policies.split(), strict=True))
    layout = {m: {**layout.get(m, {}), "data_parallel": given[m]} for m in MODULES}
    raw = model(frozen) | {"layout": layout, "schedule": schedule}
    raw["run"] = {**raw["run"], "node_size": 2}
    raw["train"] = {**raw["train"], "shard": "layer" if by_layer else "module"}
    return raw


def model(frozen: bool) -> dict[str, Any]:
    raw = small(train={"global_batch": 5} if frozen else {})
    if frozen:
        raw["model"]["vision"]["freeze"] = "all"
        raw["model"]["audio"]["freeze"] = "encoder"
        raw["model"]["llm"]["tied"] = True
    return raw


def run_jobs(raws: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], Held]]:
    return [train_and_weigh(raw, 2) for raw in raws]


def assert_equal(
    found: list[tuple[list[dict[str, Any]], Held]], reference: tuple[list[dict[str, Any]], Held], name: str
) -> None:
    """Of every rank: metrics, and its weights after the last step, against those of one process."""
    for metrics, held in found:
        assert largest_difference(metrics, reference[0]) < 1e-9, name
        for key, (index, value) in held.items():
            whole = reference[1][key][1]
            part = whole[np.ix_(*index)] if index else whole
            np.testing.assert_allclose(value, part, rtol=1e-9, atol=1e-10, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("frozen", [False, True])
def test_every_policy_learns_what_one_process_learns(frozen: bool, ranks: Any) -> None:
    names = FROZEN if frozen else tuple(JOBS)
    (reference,) = ranks(1, run_jobs, [model(frozen)])[0]
    raws = [job_of(name, frozen, by_layer=k % 2 == int(frozen)) for k, name in enumerate(names)]
    results = ranks(4, run_jobs, raws, timeout=240)
    for k, name in enumerate(names):
        assert_equal([r[k] for r in results], reference, name)


def resumed(saved: dict[str, Any], loaded: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """The second of two steps, from a checkpoint that the first ended in, written under another policy."""
    with running(saved) as (job, feed):
        train_step(job, feed, 0)
        path = checkpoint.save(job, feed.index, Path(folder), 1, feed.bad)
        kept = asdict(train_step(job, feed, 1))  # the run that has saved goes on
    with running(loaded) as (job, feed):
        checkpoint.load(job, feed.index, path)
        return [kept, asdict(train_step(job, feed, 1))]


def test_a_checkpoint_of_one_policy_is_loaded_under_another(ranks: Any, tmp_path: Path) -> None:
    (reference,) = ranks(1, run_jobs, [small()])[0]
    for saved, loaded in (("experts over nodes", "fill"), ("disjoint", "experts over nodes")):
        both = [job_of(saved, False), job_of(loaded, False)]
        for second in ranks(4, resumed, *both, str(tmp_path / saved.replace(" ", "-")), timeout=120)[0]:
            assert largest_difference([second], reference[0][1:]) < 1e-9


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


def moved(job: Job, recorder: Recorder, module: str) -> Moved:
    mesh = job.meshes[module]
    total: Counter[str] = Counter()
    for view in ("dense", *(["expert"] if mesh.folded else [])):
        over = mesh.data_parallel(view)  # type: ignore[arg-type]
        for k in range(over.ndim):
            total += recorder.seen[over.get_group(k).group_name]
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
    adam = job.optimizers[module].adam
    if adam is not None:
        found += [s[k] for s in adam.state.values() for k in ("exp_avg", "exp_avg_sq") if s]
    plain = [x._local_tensor if isinstance(x, DTensor) else x for x in found if x is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in plain}.values())


def measure(raws: list[dict[str, Any]]) -> list[dict[str, tuple[Any, Any]]]:
    """By module, (what the plan states, what a step did): messages, bytes at rest, most bytes in a step."""
    out = []
    for raw in raws:
        with running(raw) as (job, feed):
            train_step(job, feed, 0)
            most: Counter[str] = Counter()

            def observe(record: Record, job: Job = job, most: Counter[str] = most) -> None:
                for m in job.parts:
                    most[m] = max(most[m], held(job, m))

            prepared, _ = feed.next(1, 2)
            with Recorder() as recorder:
                result = run_step(job, prepared, train=True, observe=observe)
                finish_step(job, result, 1, 1e-3)
            found = {}
            for m in job.parts:
                cost = policy_costs(job.blueprint, m)[job.blueprint.policies[m]]
                found[m] = (
                    (cost.moved, cost.rest, cost.step),
                    (moved(job, recorder, m), held(job, m), most[m]),
                )
            out.append(found)
    return out


def test_each_policy_moves_and_holds_what_the_plan_states(ranks: Any) -> None:
    """Rank 0 has the largest shards. Only its policies differ between the jobs of a schedule."""
    cases = []
    for layout, schedule, train, policies in (
        ({"ep": 2}, {}, {}, POLICIES),
        ({"pp": 2}, {}, {"shard": "layer"}, ("zero2", "zero3")),
        ({"pp": 2}, {"kind": "zero_bubble"}, {"dtype": "bfloat16"}, ("zero1", "zero3")),
    ):
        for policy in policies:
            raw = small(layout={m: {"data_parallel": policy} for m in MODULES})
            raw["layout"]["llm"] |= layout
            raw |= {"schedule": {"microbatches": 3, **schedule}}
            raw["run"] = {**raw["run"], "node_size": 2}
            raw["train"] |= train
            cases.append(raw)
    for raw, found in zip(cases, ranks(4, measure, cases, timeout=240)[0], strict=True):
        for m, (stated, did) in found.items():
            split = (
                "kind" in raw["schedule"] and m == "llm"
            )  # the first half of a backward makes some gradients
            n = 2 if split else 3
            assert stated[:n] == did[:n], (raw["layout"][m], raw["schedule"], m)
            assert not split or did[2] == pytest.approx(stated[2], rel=0.1)
