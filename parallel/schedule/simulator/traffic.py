"""What FSDP's own gathers and sums of gradients add to the computations in which they are."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.schedule.action import BACKWARD_WEIGHT, COMPUTE, FORWARD, OVER_DATA, Action, Kind
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.simulator.costs import Costs


def with_traffic(
    seconds: list[float], plan: SchedulePlan, actions: Sequence[Action], costs: Costs
) -> list[float]:
    """`seconds` of the actions of a program, longer by what computations wait for weights and sums in them.

    The first unit that is gathered is waited for, the others as far as they take longer than the computation.
    So does a sum, for the one after it needs its buffer; that of the last backward outlasts it instead
    (reader.Flow.within).
    """
    if not any(kind in OVER_DATA for _, kind in costs.transfer):
        return seconds
    out = list(seconds)
    whole: set[tuple[str, int]] = set()  # stages of one unit, which stays from a forward to a backward
    for n, a in enumerate(actions):
        if a.kind not in COMPUTE or all(g.lane != "parameters" for g in a.groups):
            continue
        use, stage = plan.modules[a.module], (a.module, a.stage)
        if use.params == "each" and a.kind is not BACKWARD_WEIGHT and stage not in whole:
            out[n] += costs.beyond(a, Kind.GATHER)
        if not a.last and use.sums_in(a.kind, a.last):
            whole_sum = costs.transfer.get((a.module, Kind.GRAD_SYNC), 0.0)
            out[n] += max(0.0, costs.sums.get(a.module, whole_sum) - seconds[n])
        if a.kind is FORWARD and costs.units.get(a.module, 1) == 1:
            whole.add(stage)
        else:
            whole.discard(stage)
    return out
