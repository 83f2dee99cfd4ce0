"""Results of comparisons that nobody measured, for tests of what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm.compare.entry import placed
from mm.compare.observe import timeline_of
from mm.compare.result import ActionSeconds, RankResult, RunResult, StepSeconds, Timeline
from parallel.schedule import Costs, Record, SchedulePlan, simulate
from parallel.schedule.action import COMPUTE
from parallel.schedule.drawing.chart import measured


def records_of(plan: SchedulePlan, costs: Costs) -> dict[int, list[Record]]:
    """What ranks would record of a step that takes exactly what a simulation says."""
    line = simulate(plan, costs)
    out = {}
    for rank in plan.ranks:
        p, at, found = plan.program_of[rank], 0.0, []
        for action, start, end in zip(plan.programs[p], line.start[p], line.end[p], strict=True):
            ready = max(at, start) if action.kind in COMPUTE else at
            stop = max(ready, end) if action.kind in COMPUTE else at
            found.append(Record(action, at, stop, ready))
            at = stop
        out[rank] = found
    return out


def watched_step(plan: SchedulePlan, costs: Costs) -> Timeline:
    """The timeline of such a step."""
    records = records_of(plan, costs)
    return timeline_of(measured(plan, records), plan, sorted(records), 0)


def actions_of(records: Sequence[Record], shares: Mapping[str, float], queued: float) -> list[ActionSeconds]:
    """By action. shares: by module, of its seconds that the processor computed; 1 where it is not named.
    queued: share that ranks waited for a core."""
    out: dict[tuple[str, str], list[float]] = {}
    for action, start, end, ready in records:
        sums = out.setdefault((action.module, action.kind.value), [0.0, 0.0])
        sums[0] += end - start
        sums[1] += ready - start
    return [
        ActionSeconds(
            module=m,
            kind=kind,
            seconds=seconds,
            waited=waited,
            processor=(seconds - waited) * shares.get(m, 1.0),
            queued=(seconds - waited) * queued,
        )
        for (m, kind), (seconds, waited) in out.items()
    ]


def made_run(
    name: str,
    plan: SchedulePlan,
    costs: Costs,
    *,
    shares: Mapping[str, float] | None = None,
    queued: float = 0.0,
    update_s: float = 0.0,
    rounds: Sequence[Sequence[float]] | None = None,
    **others: Any,
) -> RunResult:
    """A run whose step was what a simulation says, and took as long in each round unless `rounds` says."""
    records = records_of(plan, costs)
    line = timeline_of(measured(plan, records), plan, sorted(records), 0)
    step = line.seconds + update_s
    timed = [list(r) for r in rounds] if rounds is not None else [[step], [step * 1.001], [step * 0.999]]
    flat = [x for r in timed for x in r]
    world = max(records) + 1
    ranks = [
        RankResult(
            rank=r,
            hosts="",
            actions=actions_of(records.get(r, ()), shares or {}, queued),
            data_s=0.0,
            update_s=update_s,
            step_s=step,
            bubble=0.0,
            idle=0.0,
            memory={"weights": 1},
        )
        for r in range(world)
    ]
    return RunResult(
        name=name,
        layout={},
        step_s=StepSeconds(sorted(flat)[len(flat) // 2], min(flat), max(flat)),
        tokens_per_s=1.0,
        peak_memory_bytes=1,
        boundary_bytes_per_step=0.0,
        losses=[1.0],
        grad_norms_by_module=[],
        max_rel_loss_diff=0.0,
        max_rel_grad_norm_diff=0.0,
        speedup=1.0,
        speedup_interval=None,
        speedup_verdict="baseline",
        rounds=timed,
        placed={m: placed(use.layout, "zero3") for m, use in plan.modules.items()},
        ranks=ranks,
        timeline=line,
        **others,
    )
