"""Drawings of a step: simulated from FLOPs before anything runs, or measured from a step that ran."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from llm.flops import head_flops, layer_costs
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.flops import forward_flops
from mm.plan.step_plan import StepPlan
from mm.plan.trained import trained_share
from mm.ranks.control import Control
from parallel.schedule import Costs, Kind, Record, SchedulePlan, simulate
from parallel.schedule.drawing.chart import Chart, measured, simulated
from parallel.schedule.drawing.draw import draw
from parallel.schedule.drawing.save import save
from parallel.schedule.drawing.trace import save_trace
from parallel.schedule.simulator.costs import USUAL

RATE = 1e10  # FLOP/s of a rank; a drawing needs proportions, and this is about one CPU core


def flop_costs(blueprint: Blueprint, plan: StepPlan) -> Costs:
    """Costs of a step's actions by FLOPs alone, at RATE a rank; transfers cost nothing."""
    compute: dict[tuple[str, Kind] | tuple[str, int, Kind], float] = {}
    load: dict[tuple[str, int], float] = {}
    work = forward_flops(blueprint, plan)
    for m in blueprint.modules:
        layout = blueprint.layouts[m]
        mean = float(work[m].mean())
        for i, flops in enumerate(work[m].tolist()):
            load[m, i] = flops / mean if mean else 0.0
        for stage, share in enumerate(_stage_shares(blueprint, m)):
            one = mean * share / (layout.size // layout.pp) / RATE
            learns = _backward_share(blueprint, m, stage)
            for kind, times in USUAL.items():
                compute[m, stage, kind] = one if kind is Kind.FORWARD else one * times * learns
    return Costs(compute=compute, load=load)


def _backward_share(blueprint: Blueprint, module: str, stage: int) -> float:
    """The share of a stage's work that has a backward; of a frozen language model the half for its inputs."""
    if module == SINK:
        return 0.5 if SINK in blueprint.frozen else 1.0
    return trained_share(blueprint, module, blueprint.stages[module][stage])


def _stage_shares(blueprint: Blueprint, module: str) -> list[float]:
    """The fraction of a module's FLOPs in each of its stages."""
    stages = blueprint.stages[module]
    if module != SINK:
        return [len(s.layers) / stages[-1].stop for s in stages]
    lengths = (blueprint.cfg.data.context,)
    layers, head = layer_costs(blueprint.llm, lengths), head_flops(blueprint.llm, lengths)
    parts = [sum(layers[s.start : s.stop]) + (head if s.last else 0.0) for s in stages]
    return [part / sum(parts) for part in parts]


def draw_simulated(blueprint: Blueprint, plan: StepPlan, folder: Path) -> list[Path]:
    """Draw a step with times from its FLOPs alone: schedule.svg and schedule.png in `folder`."""
    line = simulate(blueprint.schedule(plan.active), flop_costs(blueprint, plan))
    return _save(simulated(line), folder, "schedule")


def draw_measured(
    schedule: SchedulePlan, records: list[Record], control: Control, rank: int, folder: Path, step: int
) -> list[Path]:
    """Draw a step that ran, and write its trace for Perfetto; every rank calls this, rank 0 writes.

    Times are wall-clock times: machines' clocks are taken to agree.
    """
    by_rank = gather_records(schedule, records, control)
    if rank:
        return []
    pictures = _save(measured(schedule, by_rank), folder, f"schedule-{step}")
    trace = folder / f"trace-{step}.json"
    save_trace(by_rank, trace)
    return [*pictures, trace]


def gather_records(
    schedule: SchedulePlan, records: list[Record], control: Control
) -> dict[int, list[Record]]:
    """By rank of the schedule, the records of all ranks, in wall-clock times. Every rank calls this."""
    # Every rank knows from the plan what each rank did, so that only times are gathered.
    most = max(len(actions) for actions in schedule.programs)
    times = np.zeros((most, 3))
    wall = time.time() - time.perf_counter()
    times[: len(records)] = np.reshape([(r.start, r.end, r.ready) for r in records], (-1, 3)) + wall
    table = control.gather(times.reshape(-1).tolist()).reshape(-1, most, 3)
    return {
        r: [Record(a, *map(float, t)) for a, t in zip(schedule.actions(r), table[r], strict=False)]
        for r in schedule.ranks
    }


def _save(chart: Chart, folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    picture, paths = draw(chart), [folder / f"{stem}.svg", folder / f"{stem}.png"]
    for path in paths:
        save(picture, path)
    return paths
