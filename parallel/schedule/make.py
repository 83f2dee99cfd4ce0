"""make_schedule: the plan of a step from layouts and a schedule's name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from parallel.schedule.costs import Costs
from parallel.schedule.fill import TRIED
from parallel.schedule.job import Job, Times
from parallel.schedule.orders import ROUNDS
from parallel.schedule.plan import ModuleUse, SchedulePlan
from parallel.schedule.refuse import check_ahead, check_fill, check_modules, resolve
from parallel.schedule.simulate import simulate
from parallel.schedule.sources import Beat, beat


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

    Raises ValueError saying what was given, what is needed and the nearest that works.
    """
    batch = {m: (batch or {}).get(m, 1) for m in modules if m != sink}
    check_modules(modules, sink, active, batch)
    if kind == "fill":
        check_fill(modules, sink)
    layout = modules[sink].layout
    kind = resolve(kind, layout, len(active))
    job = Job(kind, modules, sink, tuple(frozenset(a) for a in active), batch, train, optimizer)
    works = job.sink_works([len(active)])
    if not job.beside:
        return job.apart_plan(works)
    unit = math.lcm(*(batch[m] for m in job.beside))
    full = beat(works[0]).held(unit)  # what encoders hold when the pipeline never waits for the bound
    ahead = ahead or min(full if layout.pp == 1 else 2 * full, max(len(active), unit))
    groupings = within(beat(works[0]), ahead, unit) if train else [(-(-ahead // unit) * unit, 0)]
    if kind == "three_phase":
        groupings = [(-(-len(active) // unit) * unit, 0)]
        ahead = len(active)
    elif train and full > ahead:
        quantum = math.lcm(unit, layout.pp if layout.vpp > 1 and kind in ROUNDS else 1)
        size = check_ahead(ahead, quantum, unit)
        works = job.sink_works([min(size, len(active) - i) for i in range(0, len(active), size)])
        groupings = [(size, 0)]
    times = Times.of(job, works, costs)
    plans = [job.beside_plan(works, times, size, lead, ahead) for size, lead in groupings]
    if kind == "fill" and full <= ahead:
        plans += [job.fill_plan(works, times, rules, ahead, costs or Costs()) for rules in TRIED]
    return min(plans, key=lambda plan: simulate(plan, costs).seconds) if len(plans) > 1 else plans[0]


def within(pulse: Beat, ahead: int, unit: int) -> list[tuple[int, int]]:
    """Ways to group encoder work that hold at most `ahead` micro-batches: (size of a group, lead).

    Large groups make ranks meet at few moments; a lead gives late ranks time to come to them.
    """
    sizes = range(unit, ahead + unit, unit)
    fits = {lead: [n for n in sizes if pulse.held(n, lead) <= ahead] for lead in (0, 1, 2)}
    found = [(n, lead) for lead, ns in fits.items() if ns for n in {ns[0], ns[-1]}]
    return sorted(found) or [(unit, 0)]
