"""The plan of a job as data for tools: plan.json. The records have its keys in its order."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mm.config.outline import SINK
from mm.data.sample import Index
from mm.plan.batches import first_plan
from mm.plan.blueprint import Blueprint
from mm.plan.data_parallel import PolicyCost, policy_costs
from mm.plan.flops import step_flops
from mm.plan.step_plan import StepPlan
from mm.report.groups import CommunicatorData, communicator_data
from mm.report.header import weight_bytes
from parallel.boundary import edge_rows, on_stage
from parallel.schedule import SchedulePlan
from parallel.topology.data_parallel import Policy
from parallel.topology.layout import Layout


@dataclass(frozen=True)
class PlanData:
    """What plan.json holds. Mappings are by module; edges and encoders by encoder.

    tokens, flops_by_module: of the first step. weight_bytes_per_rank: weights, gradients and optimizer.
    stages: [start, stop) of the layers of each pipeline stage. encoders: names of their classes.
    data_parallel: the policy of each module, and what every one would cost a rank.
    """

    layouts: Mapping[str, LayoutData]
    edges: Mapping[str, EdgeData]
    tokens: int
    flops_by_module: Mapping[str, float]
    weight_bytes_per_rank: Mapping[str, int]
    stages: Mapping[str, tuple[tuple[int, int], ...]]
    schedule: ScheduleData
    encoders: Mapping[str, str]
    communicators: CommunicatorData
    data_parallel: Mapping[str, PolicyData]


@dataclass(frozen=True)
class LayoutData:
    """A module's layout: its ranks in order, and the degree of each axis."""

    ranks: tuple[int, ...]
    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int
    ep: int
    edp: int
    etp: int
    sequence_parallel: bool


@dataclass(frozen=True)
class PolicyData:
    """A module's data-parallel policy, and by policy what it would cost the rank that holds most."""

    policy: Policy
    costs: Mapping[Policy, PolicyCost]


@dataclass(frozen=True)
class ScheduleData:
    """The schedule's name and its programs."""

    kind: str
    programs: tuple[ProgramData, ...]


@dataclass(frozen=True)
class ProgramData:
    """Ranks that do the same, and their actions in order."""

    ranks: tuple[int, ...]
    actions: tuple[str, ...]


@dataclass(frozen=True)
class EdgeData:
    """The boundary of an encoder in one step: its rows, and the payload that all ranks receive."""

    rows: int
    forward_bytes: int
    backward_bytes: int


def first_step(blueprint: Blueprint, index: Index) -> StepPlan:
    """The plan of step 0."""
    return first_plan(blueprint.cfg, blueprint.inputs, index)


def plan_data(blueprint: Blueprint, index: Index) -> PlanData:
    """The plan of a job, with the data of its first step."""
    plan = first_step(blueprint, index)
    frozen = blueprint.frozen
    return PlanData(
        layouts={m: _layout_data(layout) for m, layout in blueprint.layouts.items()},
        edges={m: _edge_data(blueprint, plan, m, m in frozen) for m in blueprint.inputs.encoders},
        tokens=plan.tokens,
        flops_by_module=step_flops(blueprint, plan),
        weight_bytes_per_rank=weight_bytes(blueprint),
        stages={m: tuple((s.start, s.stop) for s in stages) for m, stages in blueprint.stages.items()},
        schedule=_schedule_data(blueprint.schedule(plan.active)),
        encoders={m: use.cls.__name__ for m, use in blueprint.inputs.encoders.items()},
        communicators=communicator_data(blueprint),
        data_parallel={
            m: PolicyData(policy, policy_costs(blueprint, m)) for m, policy in blueprint.policies.items()
        },
    )


def plan_json(blueprint: Blueprint, index: Index) -> str:
    """plan_data() as JSON text."""
    return json.dumps(asdict(plan_data(blueprint, index)), indent=1)


def _layout_data(layout: Layout) -> LayoutData:
    return LayoutData(
        ranks=tuple(layout.ranks),
        tp=layout.tp,
        cp=layout.cp,
        dp=layout.dp,
        pp=layout.pp,
        vpp=layout.vpp,
        ep=layout.ep,
        edp=layout.edp,
        etp=layout.etp,
        sequence_parallel=layout.sequence_parallel,
    )


def _schedule_data(schedule: SchedulePlan) -> ScheduleData:
    programs = zip(schedule.ranks_of, schedule.programs, strict=True)
    return ScheduleData(
        schedule.kind,
        tuple(ProgramData(tuple(ranks), tuple(map(str, actions))) for ranks, actions in programs),
    )


def _edge_data(blueprint: Blueprint, plan: StepPlan, module: str, frozen: bool) -> EdgeData:
    """Rows of an edge in one step, and the payload that ranks receive for it in both directions."""
    llm = blueprint.layouts[SINK]
    rows = sum(mb.edges[module].rows for mb in plan.microbatches)
    forward = backward = 0
    for edge in blueprint.edges:
        if edge.source != module:
            continue
        row_bytes = math.prod(blueprint.entry_shape(edge)) * blueprint.dtype.itemsize
        for mb in plan.microbatches:
            sides = mb.edges[module]
            received = edge_rows(sides.source, on_stage(llm, sides.dest, edge.stage % llm.pp))
            forward += received.forward * row_bytes
            backward += 0 if frozen else received.backward * row_bytes
    return EdgeData(rows, forward, backward)
