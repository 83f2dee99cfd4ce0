"""What the seconds of a simulated rank go to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mm.predict.costs import Priced
from parallel.schedule.action import BOUNDARY, OVER_DATA, POSTED, Action, Kind
from parallel.schedule.checker.graph import Graph, graph_of
from parallel.schedule.checker.reader import START, Flow
from parallel.schedule.simulator.simulate import Timeline

Spent = dict[tuple[str, str], float]


def spent(line: Timeline, prices: Priced) -> list[Spent]:
    """By program, the seconds of its ranks by (module, what); they add up to those of the timeline.

    A computation's are split as its price is; what it takes beyond that are gathers and sums. Idle time is
    "data ranks", "boundary" or "pipeline" while what the next computation waits for travels, "bubble" while
    it is made, and "waiting" for the other members of its groups.
    """
    graph = graph_of(line.plan)
    sums = [
        (flow.ends or (), max((line.ends[k] for k in after if k != START), default=0.0) + _delay(line, flow))
        for key, after in graph.transfers.items()
        if (flow := graph.flows[key[0]]).kind is Kind.GRAD_SYNC
    ]
    last = [
        max((end for ends, end in sums if p in ends), default=0.0) for p in range(len(line.plan.programs))
    ]
    seconds = frozenset(graph.second.values())
    return [_spent(line, prices, p, seconds, last[p]) for p in range(len(line.plan.programs))]


def _spent(line: Timeline, prices: Priced, program: int, seconds: frozenset[int], summed: float) -> Spent:
    """spent() of one program. seconds: numbers of the second actions of pairs. summed: when the last sum of
    gradients that it takes part in ends."""
    graph, actions = graph_of(line.plan), line.plan.programs[program]
    out: defaultdict[tuple[str, str], float] = defaultdict(float)
    now, first = 0.0, graph.first[program]
    module = ""
    for n, a in enumerate(actions, first):
        if a.kind in POSTED:
            continue
        begin, end = line.begins[n], line.ends[n]
        if n in seconds:  # the second of a pair, whose span counts with the first
            continue
        if begin > now:
            _add(out, _idle(line, graph, n, a.module, begin - now))
        both = [a] + [actions[k - first] for k in (graph.second.get(n),) if k is not None]
        _add(out, _split(prices, both, end - begin, shared=prices.costs.cores is not None))
        now, module = max(now, end), a.module
    left = line.seconds - now
    if left > 0:
        last = max(line.ends[graph.first[program] : graph.first[program + 1]], default=0.0)
        sums = max(0.0, summed - last)
        out[module, "data ranks"] += min(left, sums)
        out[module, "bubble"] += left - min(left, sums)
    return out


def _add(out: defaultdict[tuple[str, str], float], more: Spent) -> None:
    for key, seconds in more.items():
        out[key] += seconds


def _split(prices: Priced, actions: Sequence[Action], span: float, *, shared: bool) -> Spent:
    """A span of computation by what its price consists of."""
    parts: defaultdict[tuple[str, str], float] = defaultdict(float)
    for a in actions:
        found = prices.prices.get((a.module, a.stage, a.kind))
        load = prices.costs.seconds(a)
        if found is not None and found.seconds:
            for what, s in found.by.items():
                parts[a.module, what] += load * s / found.seconds
        else:
            parts[a.module, "compute"] += load
    whole = sum(parts.values())
    if not shared and len(actions) == 1 and span > whole:
        parts[actions[0].module, "data ranks"] += span - whole
        return parts
    return {key: s * span / whole for key, s in parts.items()} if whole else parts


def _idle(line: Timeline, graph: Graph, n: int, module: str, gap: float) -> Spent:
    """A gap before a computation by what it waited for last."""
    begin, best = line.begins[n], (0.0, "waiting", 0.0)
    for key in graph.waits.get(n, ()):
        flow = graph.flows[key[0]]
        start = max((line.ends[k] for k in graph.transfers[key] if k != START), default=0.0)
        delay = _delay(line, flow)
        what = "boundary" if flow.kind in BOUNDARY else "data ranks" if flow.kind in OVER_DATA else "pipeline"
        best = max(best, (start + delay, what, delay))
    came, what, delay = best
    if what == "waiting" or came < begin - 1e-9 * max(1.0, begin):
        return {(module, "waiting"): gap}
    moving = min(gap, delay)
    return {(module, what): moving, (module, "bubble"): gap - moving}


def _delay(line: Timeline, flow: Flow) -> float:
    """Seconds that a flow's transfers take."""
    if flow.within is not None:
        return line.costs.beyond(flow.within, flow.kind)
    return line.costs.transfer.get((flow.module, flow.kind), 0.0)
