"""Plans from the sink's pipeline and the sources' works, for disjoint and colocated sources. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from parallel.schedule.action import BACKWARD_WEIGHT, FORWARD
from parallel.schedule.checker.graph import graph_of
from parallel.schedule.checker.order import Stuck
from parallel.schedule.generators.fill import RULES_TRIED, Filler, FillProblem, NoProgress, Unit, fill
from parallel.schedule.generators.lower import lower
from parallel.schedule.generators.orders import PAIRED, PIPELINES, Work, windows
from parallel.schedule.generators.problem import Problem
from parallel.schedule.generators.sources import (
    FirstStageOrder,
    Grouping,
    MicrobatchGroup,
    Slot,
    by_slot,
    disjoint_works,
    first_stage_order,
    insert,
    microbatch_groups,
    source_spans,
)
from parallel.schedule.generators.times import Times
from parallel.schedule.plan import Place, SchedulePlan
from parallel.schedule.simulator.costs import Costs

Pipelines = Sequence[Sequence[Work]]  # the sink's works, by pipeline rank


def sink_works(problem: Problem, sizes: Sequence[int]) -> list[list[Work]]:
    """The sink's works by pipeline rank. sizes: micro-batches for which the pipeline fills and drains."""
    sink, layout = problem.sink, problem.modules[problem.sink].layout
    frozen = {m for m, u in problem.modules.items() if u.frozen}
    back = [problem.options.train and (sink not in frozen or bool(a - frozen)) for a in problem.active]
    out = []
    for r in range(layout.pp):
        pipeline = (PAIRED if problem.paired else PIPELINES)[problem.kind]
        order = windows(pipeline, sizes, r, layout.pp, layout.vpp)
        # A forward without a backward of its own may be the last that its stage computes.
        paired = [
            w.paired and back[w.microbatch] and back[order[k + 1].microbatch] for k, w in enumerate(order)
        ]
        works = [
            Work(w.kind, sink, w.stage, w.microbatch, paired=both)
            for w, both in zip(order, paired, strict=True)
            if w.kind is FORWARD or back[w.microbatch]
        ]
        if sink in frozen:  # no weight has a gradient, so the backward of the inputs is the whole backward
            works = [w for w in works if w.kind is not BACKWARD_WEIGHT]
        out.append(works)
    return out


def disjoint_plan(problem: Problem, works: Pipelines, slack: int) -> SchedulePlan:
    """The plan where no source shares a rank with the sink. slack: how many micro-batches sources are ahead
    beyond their stages, so that transfers run beside computations."""
    order = first_stage_order(works[0])
    lists = {}
    for place in problem.places:
        r, here = problem.at(place)
        lists[place] = works[r] if r is not None else by_slot(_disjoint(problem, here, order, slack))
    return lower(problem, lists)


def colocated_plan(
    problem: Problem, works: Pipelines, times: Times, grouping: Grouping, ahead: int
) -> SchedulePlan:
    """The plan where sources on ranks of the sink compute groups of micro-batches.

    Every rank computes a group at the same moment of the sink's pipeline, so that collectives meet.
    """
    order = first_stage_order(works[0])
    moments = [
        (*times.insertion(group, order, grouping), group)
        for group in microbatch_groups(len(problem.active), grouping.size, problem.options.train)
        if not group.backward or times.returns(group)
    ]
    moments.sort(key=lambda moment: moment[0])
    lists: dict[Place, Sequence[Work]] = {}
    for place in problem.places:
        r, here = problem.at(place)
        parts = [(slot, second, _group_works(problem, group, here)) for slot, second, group in moments]
        if r is not None:
            lists[place] = insert(works[r], times.starts[r], [(t, found) for _, t, found in parts])
        else:
            together = [(slot, w) for slot, _, found in parts for w in found]
            lists[place] = by_slot([*_disjoint(problem, here, order, grouping.slack), together])
    return lower(problem, lists, ahead=ahead)


def fill_plans(problem: Problem, works: Pipelines, times: Times, ahead: int) -> list[SchedulePlan]:
    """Plans where sources on ranks of the sink compute in its idle time, one for each of RULES_TRIED."""
    order, sources = first_stage_order(works[0]), problem.colocated
    at = {place: problem.at(place) for place in problem.places}
    homes = [(place, r, here) for place, (r, here) in at.items() if r is not None]
    given = FillProblem(
        pipeline=works,
        starts=times.starts,
        stages=problem.modules[problem.sink].stages,
        units=[Unit(r, {m: here[m] for m in sources if m in here}) for _, r, here in homes],
        fillers={
            m: Filler(
                spans=source_spans(0, len(problem.active), problem.batch[m], problem.active, m),
                stages=problem.modules[m].stages,
                learns=problem.learns(m),
                enters=problem.modules[m].enters,
            )
            for m in sources
        },
        active=problem.active,
        ahead=ahead,
        costs=problem.options.costs or Costs(),
    )
    lists = {p: by_slot(_disjoint(problem, here, order, 1)) for p, (r, here) in at.items() if r is None}
    plans = []
    for rules in RULES_TRIED:
        # Ranks of the sink that gather or sum together may have sources' works of different lengths between:
        # fill() knows no such meetings, so that an order of its own can be one that gets stuck.
        with contextlib.suppress(NoProgress, Stuck):
            filled = dict(zip((place for place, *_ in homes), fill(given, rules), strict=True))
            plan = lower(problem, {**lists, **filled}, ahead=ahead, late=sources)
            graph_of(plan)
            plans.append(plan)
    return plans


def _disjoint(
    problem: Problem, here: Mapping[str, range], order: FirstStageOrder, slack: int
) -> list[list[tuple[Slot, Work]]]:
    """Works, at a place with the stages `here`, of the sources that share no rank with the sink."""
    out = []
    for m, stages in here.items():
        if m in problem.colocated:
            continue
        for s in stages:
            works = disjoint_works(
                source=m,
                stage=s,
                lead=problem.modules[m].stages - s + slack if problem.kind != "sequential" else 0,
                order=order,
                active=problem.active,
                size=problem.batch[m],
                backward=problem.learns(m),
            )
            out.append(works)
    return out


def _group_works(problem: Problem, group: MicrobatchGroup, here: Mapping[str, range]) -> list[Work]:
    """What the colocated sources with stages `here` compute of a group."""
    doing = [m for m in here if m in problem.colocated and not (group.backward and problem.modules[m].frozen)]
    return [w for m in doing for w in group.works(m, here[m], problem.active, problem.batch[m])]
