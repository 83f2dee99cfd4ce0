"""How much of the time of transfers a run hides, of what its plan says it can hide.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.schedule.hidden [--unit 0.05] [--delay 0.3]

Plans are carried out by stand-ins on gloo ranks: computations sleep, and links are as slow as the cost model
says. A unit is the forward of a stage of the language model; an encoder's forward costs half of it, backwards
twice their forwards, each message `--delay` of it, each gather of a stage's weights and each sum of its
gradients DATA times as much.

transfers: what the busiest rank's transfers take together, in units. planned: the share of it that costs the
simulated step nothing. hidden: the same share of the measured step, as the difference between the step with
slow links and the step with links that take no time, best of `--runs`. of planned: hidden / planned.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from typing import Any, NamedTuple

import torch.distributed as dist

from benchmarks import common
from mm.train.garbage import set_aside
from parallel.schedule import Costs, Kind, ModuleUse, ScheduleOptions, SchedulePlan, make_schedule, simulate
from parallel.schedule.action import BOUNDARY, OVER_DATA, SENDS
from parallel.schedule.checker.reader import reading_of
from parallel.schedule.executor.standin import run_standins
from parallel.topology.layout import make_layout

WORLD, MICROBATCHES = 4, 8
DATA = 4
MESSAGES: frozenset[Kind] = SENDS | BOUNDARY
GATHERS, SUMS = frozenset({Kind.GATHER}), frozenset({Kind.GRAD_SYNC})


class Case(NamedTuple):
    """A plan and its slow transfers. kind: of the schedule. specs: layout keys by module."""

    kind: str
    specs: dict[str, dict[str, Any]]
    slow: frozenset[Kind] = MESSAGES


COLOCATED: dict[str, dict[str, Any]] = {"vision": {}, "llm": {"pp": 2}}
CASES = {
    "boundary, colocated": Case("auto", {"vision": {}, "llm": {"tp": 2}}),
    "boundary, colocated with pp2": Case("auto", {"vision": {}, "llm": {"pp": 2, "tp": 2}}),
    "boundary, disjoint": Case("auto", {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3"}}),
    "boundary and pipeline, disjoint": Case(
        "auto", {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}}
    ),
    "boundary and pipeline, fill": Case("fill", {"vision": {}, "llm": {"pp": 4}}),
    "pipeline": Case("1f1b", {"llm": {"pp": 4}}),
    "pipeline, interleaved": Case("interleaved", {"llm": {"pp": 4, "vpp": 2}}),
    "pipeline, zero-bubble": Case("zero_bubble", {"llm": {"pp": 4}}),
    "data ranks, gathers of a step": Case("auto", COLOCATED, GATHERS),
    "data ranks, sums": Case("auto", COLOCATED, SUMS),
    "data ranks, sums of virtual stages": Case("interleaved", {"llm": {"pp": 2, "vpp": 2}}, SUMS),
    "data ranks, gathers and sums, fill": Case("fill", COLOCATED, GATHERS | SUMS),
}
# Plans with pairs of a forward and a backward, in which the transfers are the expert exchanges: two in each.
PAIRED: dict[str, dict[str, Any]] = {
    "experts": {"ep": 2},
    "experts, pp2": {"ep": 2, "pp": 2},
    "experts, pp2 vpp2": {"ep": 2, "pp": 2, "vpp": 2},
}
COMPUTE = {("vision", Kind.FORWARD): 0.5, ("vision", Kind.BACKWARD): 1.0}


def main() -> None:
    """Every rank runs this; rank 0 prints."""
    args = common.parser(__doc__)
    args.add_argument("--unit", type=float, default=0.05, help="seconds of a forward (default 0.05)")
    args.add_argument(
        "--delay", type=float, default=0.3, help="of a unit that a transfer takes (default 0.3)"
    )
    args.add_argument("--runs", type=int, default=3, help="of each plan (default 3)")
    args.add_argument("--only", default="", help="plans whose names contain this")
    given = args.parse_args()
    dist.init_process_group("gloo")
    if dist.get_world_size() != WORLD:
        raise SystemExit(f"started with {dist.get_world_size()} ranks; needed: {WORLD}")
    if dist.get_rank() == 0:
        print("| plan | transfers | planned | hidden | of planned |\n|---|---|---|---|---|")
    for name, case in CASES.items():
        if given.only not in name:
            continue
        slow, fast = costs_of(case, given.delay), Costs(COMPUTE)
        plan = plan_of(case, slow)
        report(name, plan, most_moved(plan, slow), (slow, fast), given)
    for name, spec in PAIRED.items():
        if given.only not in name:
            continue
        keys = [("llm", kind) for kind in (Kind.FORWARD, Kind.BACKWARD)]
        slow, fast = (Costs(exchange=dict.fromkeys(keys, (given.delay * n,) * 2)) for n in (1, 0))
        modules = {"llm": ModuleUse(make_layout("llm", WORLD, spec), params="step")}
        options = ScheduleOptions(costs=slow, overlap_experts=True)
        plan = make_schedule("auto", modules, sink="llm", active=[set()] * MICROBATCHES, options=options)
        total = 4 * given.delay * MICROBATCHES * spec.get("vpp", 1)
        report(name, plan, total, (slow, fast), given)
    dist.destroy_process_group()


def report(name: str, plan: SchedulePlan, total: float, links: tuple[Costs, Costs], given: Namespace) -> None:
    """Carry out a plan over slow and over fast links; rank 0 prints. total: units that its transfers take."""
    slow, fast = links
    planned = total - (simulate(plan, slow).seconds - simulate(plan, fast).seconds)
    took = [min(seconds(plan, costs, given.unit) for _ in range(given.runs)) for costs in links]
    hidden = total - (took[0] - took[1]) / given.unit
    if dist.get_rank() == 0:
        of_planned = f"{hidden / planned:.0%}" if planned > 0.01 * total else "none planned"
        shares = f"{planned / total:.0%} | {hidden / total:.0%} | {of_planned}"
        print(f"| {name} | {total:.1f} | {shares} |", flush=True)


def costs_of(case: Case, delay: float) -> Costs:
    """Of a case whose messages take `delay`."""
    each = {kind: delay * (DATA if kind in OVER_DATA else 1) for kind in case.slow}
    return Costs(COMPUTE, {(m, kind): seconds for m in case.specs for kind, seconds in each.items()})


def plan_of(case: Case, costs: Costs) -> SchedulePlan:
    """Its plan, in which weights are whole for the step."""
    modules = {m: ModuleUse(make_layout(m, WORLD, spec), params="step") for m, spec in case.specs.items()}
    active = [case.specs.keys() - {"llm"}] * MICROBATCHES
    options = ScheduleOptions(costs=costs, optimizer=True)  # which waits for the sums
    return make_schedule(case.kind, modules, sink="llm", active=active, options=options)


def most_moved(plan: SchedulePlan, costs: Costs) -> float:
    """What the transfers take that the rank with the most of them waits for."""
    reading = reading_of(plan)
    takes = [costs.transfer.get((flow.module, flow.kind), 0.0) for flow in reading.flows]
    waited = [
        sum(takes[flow] for n in range(low, high) for flow, _ in reading.waits.get(n, ()))
        for low, high in itertools.pairwise(reading.first)
    ]
    return max(waited)


def seconds(plan: SchedulePlan, costs: Costs, unit: float) -> float:
    """How long a step takes, from the first rank's start to the last one's end."""
    with set_aside():
        records = run_standins(plan, costs, unit)
    span: list[Any] = [None] * WORLD
    dist.all_gather_object(span, (records[0].start, records[-1].end) if records else None)
    some = [s for s in span if s is not None]
    return max(end for _, end in some) - min(start for start, _ in some)


if __name__ == "__main__":
    main()
