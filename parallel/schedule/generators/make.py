"""make_schedule: the plan of a step from layouts and a schedule's name."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from parallel.schedule.action import BACKWARD, BOUNDARY, FORWARD, Action, Kind
from parallel.schedule.checker.memory import check_limit, peaks
from parallel.schedule.generators.compose import (
    colocated_plan,
    disjoint_plan,
    fill_plans,
    sink_works,
)
from parallel.schedule.generators.posting import in_one_order
from parallel.schedule.generators.problem import Problem, ScheduleOptions
from parallel.schedule.generators.refuse import (
    check_ahead,
    check_effect,
    check_fill,
    check_modules,
    check_pairs,
    resolve,
)
from parallel.schedule.generators.sources import FirstStageOrder, Grouping, first_stage_order
from parallel.schedule.generators.times import Times
from parallel.schedule.plan import ModuleUse, SchedulePlan
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import simulate


def make_schedule(
    kind: str,
    modules: Mapping[str, ModuleUse],
    *,
    sink: str,
    active: Sequence[Collection[str]],
    options: ScheduleOptions | None = None,
) -> SchedulePlan:
    """The actions of every rank for one step.

    kind: "auto" takes "interleaved" where the sink has virtual stages, else "1f1b". For a sink of one stage
        1F1B is encoder, boundary, language model, one micro-batch after the other. "sequential", "gpipe" and
        "zero_bubble" are other pipelines of the sink. "three_phase" computes all source forwards before 1F1B
        and all source backwards after it. "fill" lets each rank compute them in the pipeline's idle time.
    modules: sources in the order that all ranks use, and the sink. The ranks of two modules may be equal,
        disjoint or overlap.
    active: per micro-batch, the sources that have items in it on any rank.

    Raises ValueError with what was given, what is needed and the nearest choice that works.
    """
    options = options or ScheduleOptions()
    present = tuple(frozenset(a) for a in active)
    problem = Problem(kind, modules, sink, present, options)
    check_modules(modules, sink, present, problem.batch)
    if kind == "fill":
        check_fill(modules, sink)
    problem = replace(problem, kind=resolve(kind, modules[sink].layout))
    if problem.kind == "sequential":  # it is there for its memory
        problem = replace(problem, options=replace(options, slack=False))
    pairs = None if options.overlap_experts is False else _in_pairs(problem)
    if pairs is not None and options.overlap_experts:
        return pairs
    plan = _plan(problem, options.ahead)
    if pairs is not None and _seconds(problem, pairs) < _seconds(problem, plan):
        return pairs
    limit = options.limit
    if limit is not None and _holds(plan, options) > limit:
        problem = replace(problem, options=replace(options, slack=False))
        plan = _plan(problem, options.ahead)
        if _holds(plan, options) > limit:
            check_limit(plan, limit, options.memory, nearest=_within_limit(problem, plan, limit))
    return plan


def _in_pairs(problem: Problem) -> SchedulePlan | None:
    """The plan whose expert exchanges run beside computations; None where there is none within the limit.

    Raises ValueError (Unfit) instead where pairs were asked for.
    """
    options = problem.options
    if not options.train:
        return None
    try:
        check_pairs(problem.kind, problem.modules, problem.sink, len(problem.active))
        for slack in (options.slack, False):
            tried = replace(problem, paired=True, options=replace(options, slack=slack))
            plan = _plan(tried, options.ahead)
            if not any(a.paired for _, a in plan):
                check_effect(problem.modules[problem.sink], options.ahead)
                return None
            if options.limit is None or _holds(plan, options) <= options.limit:
                return plan
        assert options.limit is not None
        check_limit(plan, options.limit, options.memory, nearest="schedule.overlap_experts=false, or ")
    except ValueError:
        if options.overlap_experts:
            raise
    return None


def _holds(plan: SchedulePlan, options: ScheduleOptions) -> float:
    """The activation memory of the rank that holds most."""
    return max(peak.bytes for peak in peaks(plan, options.memory))


def _plan(problem: Problem, ahead: int | None) -> SchedulePlan:
    """The fastest, by simulation, of the plans that a problem and a bound allow."""
    layout, m = problem.modules[problem.sink].layout, len(problem.active)
    works, slacks = sink_works(problem, [m]), [1, 0] if problem.options.slack else [0]
    if not problem.colocated:
        return _fastest(problem, [disjoint_plan(problem, works, slack) for slack in slacks])
    if problem.paired:  # a pair is two computations
        slacks = [2 * slack for slack in slacks]
    unit = math.lcm(*(problem.batch[s] for s in problem.colocated))
    order = first_stage_order(works[0])
    full = order.in_flight(Grouping(unit))  # what sources hold when the pipeline never waits for the bound
    if ahead is None:
        hidden = order.in_flight(Grouping(unit, slack=slacks[0]))
        least = layout.pp == 1 or problem.kind == "sequential"
        ahead = min(hidden if least else max(hidden, 2 * full), max(m, unit))
    groupings = groupings_within(order, ahead, unit, slacks)
    if problem.kind == "three_phase":
        groupings, ahead = [Grouping(_round_up(m, unit))], m
    elif not problem.options.train:
        groupings = [Grouping(_round_up(ahead, unit))]
    elif full > ahead:
        size = check_ahead(ahead, unit)
        works = sink_works(problem, [min(size, m - i) for i in range(0, m, size)])
        groupings = [Grouping(size)]
    times = Times.of(problem, works)
    plans = [colocated_plan(problem, works, times, grouping, ahead) for grouping in groupings]
    if problem.kind == "fill" and full <= ahead:
        plans += fill_plans(problem, works, times, ahead)
    return _fastest(problem, plans)


def _fastest(problem: Problem, plans: Sequence[SchedulePlan]) -> SchedulePlan:
    """The plan that takes the least simulated time, in one order; the first of equal ones."""
    plans = list({plan.programs: plan for plan in reversed(plans)}.values())[::-1]  # few micro-batches: equal
    best = plans[0] if len(plans) == 1 else min(plans, key=lambda plan: _seconds(problem, plan))
    if not any(a.kind is Kind.GATHER for _, a in best):
        return in_one_order(best, problem.options.costs)
    return _gathered_late(problem, best)


# How many computations before its weights are needed a gather may start; None: with the step. Fewer hold the
# weights for less time.
LEADS = (0, 1, 2, 4, None)


def _gathered_late(problem: Problem, plan: SchedulePlan) -> SchedulePlan:
    """The plan in one order, whose gathers start as late as costs no simulated time, and within the limit."""
    options, least, best = problem.options, math.inf, plan
    most = math.inf if options.limit is None else options.limit
    at_once = in_one_order(plan, options.costs, None)
    fastest = _seconds(problem, at_once)
    for lead in LEADS:
        found = at_once if lead is None else in_one_order(plan, options.costs, lead)
        took = fastest if lead is None else _seconds(problem, found)
        if lead == LEADS[0] or (took < least and _holds(found, options) <= most):
            least, best = took, found
        if least <= fastest:
            break
    return best


def _seconds(problem: Problem, plan: SchedulePlan) -> float:
    """The simulated time of a plan, in which rows take time: plans that hide it win.

    Where nobody says how much, each transfer takes a tenth of a forward, and so do the two expert exchanges
    of a forward, or of a backward, together.
    """
    costs = problem.options.costs or Costs()
    rows = {(m, kind): 0.1 for m in problem.batch for kind in BOUNDARY}
    rows |= {(m, Kind.GATHER): 0.1 for m, use in problem.modules.items() if use.params == "step"}
    exchange = dict(costs.exchange)
    layout = problem.modules[problem.sink].layout
    if not exchange and layout.ep * layout.etp > 1:
        forward = replace(costs, load={}).seconds(Action(FORWARD, problem.sink, 0))
        exchange = {(problem.sink, kind): (0.05 * forward,) * 2 for kind in (FORWARD, BACKWARD)}
    priced = replace(costs, transfer={**rows, **costs.transfer}, exchange=exchange)
    return simulate(plan, priced).seconds


def _within_limit(problem: Problem, plan: SchedulePlan, limit: float) -> str:
    """What keeps to a limit that `plan` exceeds: a smaller `ahead` or another kind; empty if nothing does."""
    for ahead in range((plan.ahead or 1) - 1, 0, -1):
        with contextlib.suppress(ValueError):  # less than encoders take at once
            if _holds(_plan(problem, ahead), problem.options) <= limit:
                return f"schedule.ahead={ahead}, or "
    one = _plan(replace(problem, kind="sequential"), 1 if set(problem.batch.values()) <= {1} else None)
    return "schedule.kind=sequential, or " if _holds(one, problem.options) <= limit else ""


def groupings_within(order: FirstStageOrder, ahead: int, unit: int, slacks: Sequence[int]) -> list[Grouping]:
    """Groupings, in multiples of `unit`, under which a source has at most `ahead` micro-batches in flight.

    Large groups make ranks meet at few moments. A lead gives late ranks time to come to them; slack gives
    transfers time.
    """
    found: list[Grouping] = []
    for lead, slack in itertools.product((0, 1, 2), slacks):
        sizes = [Grouping(n, lead, slack) for n in range(unit, ahead + unit, unit)]
        fits = [grouping for grouping in sizes if order.in_flight(grouping) <= ahead]
        found += {fits[0], fits[-1]} if fits else ()
    return sorted(found, key=lambda g: (g.size, g.lead, -g.slack)) or [Grouping(unit)]


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
