"""make_schedule: the plan of a step from layouts and a schedule's name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from parallel.schedule.checker.memory import Memory, check_limit, peaks
from parallel.schedule.generators.orders import ROUNDS
from parallel.schedule.generators.problem import Job, Times
from parallel.schedule.generators.refuse import check_ahead, check_fill, check_modules, resolve
from parallel.schedule.generators.sources import Beat, beat
from parallel.schedule.plan import ModuleUse, SchedulePlan
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import simulate


def make_schedule(
    kind: str,
    modules: Mapping[str, ModuleUse],
    *,
    sink: str,
    active: Sequence[Collection[str]],
    ahead: int | None = None,
    batch: Mapping[str, int] | None = None,
    costs: Costs | None = None,
    train: bool = True,
    optimizer: bool = False,
    limit: float | None = None,
    memory: Memory | None = None,
) -> SchedulePlan:
    """The actions of every rank for one step.

    kind: "auto" takes "interleaved" where the sink has virtual stages, else "1f1b", which for a sink of one
        stage is encoder, boundary, language model per micro-batch. "sequential", "gpipe" and "zero_bubble"
        are other pipelines of the sink; "three_phase" computes the sources of the whole step before and
        after 1F1B; "fill" lets each rank compute them in the pipeline's idle time.
    modules: sources in the order that all ranks use, and the sink; each on its own ranks, the same as another
        module's, others, or partly the same.
    active: per micro-batch, the sources with items on any rank.
    ahead: for how many micro-batches a source on ranks of the sink may hold activations; None for twice as
        many as the sink's pipeline does. A bound below that fills and drains the pipeline once for so many.
    batch: by source, for how many micro-batches it computes at once (1).
    costs: what orders that depend on time assume.
    optimizer: end with the update.
    limit: refuse a plan in which a rank holds more activations, in units of `memory`.

    Raises ValueError saying what was given, what is needed and the nearest that works.
    """
    batch = {m: (batch or {}).get(m, 1) for m in modules if m != sink}
    check_modules(modules, sink, active, batch)
    if kind == "fill":
        check_fill(modules, sink)
    kind = resolve(kind, modules[sink].layout, len(active))
    job = Job(kind, modules, sink, tuple(frozenset(a) for a in active), batch, train, optimizer)
    plan = _plan(job, ahead, costs)
    if limit is not None and max(peak.bytes for peak in peaks(plan, memory)) > limit:
        check_limit(plan, limit, memory, nearest=_smaller(job, plan, limit, memory, costs))
    return plan


def _plan(job: Job, ahead: int | None, costs: Costs | None) -> SchedulePlan:
    """The fastest by simulation of the plans that a job and a bound allow."""
    layout, m = job.modules[job.sink].layout, len(job.active)
    works = job.sink_works([m])
    if not job.beside:
        return job.apart_plan(works)
    unit = math.lcm(*(job.batch[s] for s in job.beside))
    full = beat(works[0]).held(unit)  # what encoders hold when the pipeline never waits for the bound
    ahead = ahead or min(full if layout.pp == 1 else 2 * full, max(m, unit))
    groupings = within(beat(works[0]), ahead, unit) if job.train else [(-(-ahead // unit) * unit, 0)]
    if job.kind == "three_phase":
        groupings, ahead = [(-(-m // unit) * unit, 0)], m
    elif job.train and full > ahead:
        quantum = math.lcm(unit, layout.pp if layout.vpp > 1 and job.kind in ROUNDS else 1)
        size = check_ahead(ahead, quantum, unit)
        works = job.sink_works([min(size, m - i) for i in range(0, m, size)])
        groupings = [(size, 0)]
    times = Times.of(job, works, costs)
    plans = [job.beside_plan(works, times, size, lead, ahead) for size, lead in groupings]
    if job.kind == "fill" and full <= ahead:
        plans += job.fill_plans(works, times, ahead, costs or Costs())
    return min(plans, key=lambda plan: simulate(plan, costs).seconds) if len(plans) > 1 else plans[0]


def _smaller(job: Job, plan: SchedulePlan, limit: float, memory: Memory | None, costs: Costs | None) -> str:
    """What keeps to a limit that `plan` breaks: less ahead, or another schedule; empty where nothing does."""
    for ahead in range((plan.ahead or 1) - 1, 0, -1):
        with contextlib.suppress(ValueError):  # no multiple of a round
            if max(peak.bytes for peak in peaks(_plan(job, ahead, costs), memory)) <= limit:
                return f"schedule.ahead={ahead}, or "
    one = _plan(replace(job, kind="sequential"), 1 if set(job.batch.values()) <= {1} else None, costs)
    return "schedule.kind=sequential, or " if max(p.bytes for p in peaks(one, memory)) <= limit else ""


def within(pulse: Beat, ahead: int, unit: int) -> list[tuple[int, int]]:
    """Ways to group encoder work that hold at most `ahead` micro-batches: (size of a group, lead).

    Large groups make ranks meet at few moments; a lead gives late ranks time to come to them.
    """
    sizes = range(unit, ahead + unit, unit)
    fits = {lead: [n for n in sizes if pulse.held(n, lead) <= ahead] for lead in (0, 1, 2)}
    found = [(n, lead) for lead, ns in fits.items() if ns for n in {ns[0], ns[-1]}]
    return sorted(found) or [(unit, 0)]
