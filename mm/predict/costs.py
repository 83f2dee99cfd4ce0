"""What the actions of a schedule cost on given hardware, from counts: the simulator's Costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.hardware import Hardware, Host
from mm.predict.links import Places, message_seconds, processor_seconds
from mm.predict.price import Price, What, message_price, price
from mm.predict.work import Counts, Message
from parallel.schedule import Costs
from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BOUNDARY_BACKWARD,
    BOUNDARY_FORWARD,
    COMPUTE,
    FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Kind,
)
from parallel.topology.groups import WORLD, Direction, Group

Key = tuple[str, int, Kind]
Extra = dict[Key, defaultdict[What, float]]
NUMBERS = 48  # float64 that each rank tells all others in the message of an update, about
UPDATE_CALLS = 3  # of each weight in an update, counted as the launches of a computation
ENTERING = (FORWARD, BACKWARD, BACKWARD_INPUT)  # computations that receive before and send after


@dataclass(frozen=True)
class Priced:
    """costs: for the simulator. prices: by (module, stage, kind), what their seconds consist of."""

    costs: Costs
    prices: Mapping[Key, Price]


def priced(blueprint: Blueprint, plan: StepPlan, counts: Counts, hardware: Hardware) -> Priced:
    """The costs of a step's actions on the data rank with most work."""
    places = places_of(blueprint, hardware)
    prices = {key: price(work, places, hardware) for key, work in counts.work.items() if key[2] in COMPUTE}
    host = hardware.host
    if host is not None:
        for key, extra in _at_ends(blueprint, plan, counts, (places, host)).items():
            by = {
                what: prices[key].by.get(what, 0.0) + extra.get(what, 0.0)
                for what in dict.fromkeys((*prices[key].by, *extra))  # in one order: sums are of floats
            }
            prices[key] = replace(prices[key], by=by, fixed=prices[key].fixed + sum(extra.values()))
    transfer = _transfers(blueprint, counts, places, hardware)
    costs = Costs(
        compute={key: p.seconds - sum(p.exchanges) for key, p in prices.items()},
        transfer={key: s for key, s in transfer.items() if s},
        exchange={key: p.exchanges for key, p in prices.items() if p.exchanges},
        load=_loads(counts, prices),
        cores=None if host is None else host.cores,
        share={} if host is None else _shares(blueprint, plan, prices),
        units={m: max(1, _units(counts, m)) for m in blueprint.modules},
        sums={} if host is not None else _sums_before_last(counts, places, hardware),
    )
    return Priced(costs, prices)


def places_of(blueprint: Blueprint, hardware: Hardware) -> Places:
    """Where the job's groups are. The config's nodes, or else the hardware's."""
    size = blueprint.node_size or hardware.links.node_size
    return Places.of(blueprint.groups, size if size is not None and size < blueprint.world else None)


def _fixed_share(prices: Mapping[Key, Price], module: str) -> float:
    """The part of a module's seconds that does not grow with the load."""
    own = [p for (m, _, kind), p in prices.items() if m == module and kind in (FORWARD, BACKWARD)]
    whole = sum(p.seconds for p in own)
    return sum(p.fixed for p in own) / whole if whole else 0.0


def _loads(counts: Counts, prices: Mapping[Key, Price]) -> dict[tuple[str, int], float]:
    """Counts.load as a factor on seconds: a part of these is there whatever the load."""
    fixed = {m: _fixed_share(prices, m) for m, _ in counts.load}
    return {(m, k): fixed[m] + (1 - fixed[m]) * x if x else 0.0 for (m, k), x in counts.load.items()}


def _shares(blueprint: Blueprint, plan: StepPlan, prices: Mapping[Key, Price]) -> dict[str, float]:
    """By module, the seconds of the mean data rank over those of the one with most."""
    out = {}
    for m in blueprint.modules:
        found = [i.dealt for i in plan.imbalance(None if m == SINK else m) if i is not None]
        mean = sum(1 / x for x in found) / len(found) if found else 1.0
        fixed = _fixed_share(prices, m)
        out[m] = fixed + (1 - fixed) * mean
    return out


def _units(counts: Counts, module: str) -> int:
    return max((len(found) for (m, _, _), found in counts.moved.items() if m == module), default=1)


def _transfers(
    blueprint: Blueprint, counts: Counts, places: Places, hardware: Hardware
) -> dict[tuple[str, Kind], float]:
    """Seconds of what travels beside computations. Where messages cost processor time, that of data ranks is
    in the computations, and the rest take their latency."""
    out: dict[tuple[str, Kind], float] = {}

    def at_least(module: str, kind: Kind, seconds: float) -> None:
        out[module, kind] = max(out.get((module, kind), 0.0), seconds)

    for (m, s), size in counts.hidden.items():
        if s + 1 < len(blueprint.stages[m]):
            for kind, group in _pipeline(m):
                at_least(
                    m, kind, message_seconds(Message("send", group, size), places.of_group(group), hardware)
                )
    for (m, stage), size in counts.rows.items():
        for kind, group in _edge(m, stage):
            at_least(m, kind, message_seconds(Message("send", group, size), places.of_group(group), hardware))
    if hardware.host is None:
        for (m, _, kind), messages in counts.moved.items():
            at_least(m, kind, sum(message_price(x, places, hardware)[0] for x in messages))
    return out


def _sums_before_last(counts: Counts, places: Places, hardware: Hardware) -> dict[str, float]:
    """Seconds of the sums that every backward of a step has, by module: those that come once are left out."""
    out: dict[str, float] = {}
    for (m, _, kind), messages in counts.moved.items():
        if kind is Kind.GRAD_SYNC:
            own = sum(message_price(x, places, hardware)[0] for x in messages if x.times > 1)
            out[m] = max(out.get(m, 0.0), own)
    return out


def _pipeline(module: str) -> list[tuple[Kind, Group]]:
    ways: tuple[tuple[Kind, Direction], ...] = ((SEND_FORWARD, "forward"), (SEND_BACKWARD, "backward"))
    return [(kind, Group("module", module, "pp", way)) for kind, way in ways]


def _edge(source: str, stage: int) -> list[tuple[Kind, Group]]:
    ways: tuple[tuple[Kind, Direction], ...] = (
        (BOUNDARY_FORWARD, "forward"),
        (BOUNDARY_BACKWARD, "backward"),
    )
    return [(kind, Group("edge", source, "", way, stage)) for kind, way in ways]


def _at_ends(
    blueprint: Blueprint, plan: StepPlan, counts: Counts, given: tuple[Places, Host]
) -> Mapping[Key, Mapping[What, float]]:
    """Processor seconds that sending and receiving add to computations: of hidden states, of rows, and of
    gathers and sums, evenly over a stage's forwards and backwards."""
    places, host = given
    out: Extra = {key: defaultdict(float) for key in counts.work if key[2] in COMPUTE}
    for (m, s), size in counts.hidden.items():
        if s + 1 < len(blueprint.stages[m]):
            group = _pipeline(m)[0][1]
            one = processor_seconds(Message("send", group, size), places.of_group(group).ranks, host)
            for stage in (s, s + 1):
                _add(out, (m, stage), "pipeline", one)
    for (m, stage), size in counts.rows.items():
        group = _edge(m, stage)[0][1]
        one = processor_seconds(Message("send", group, size), places.of_group(group).ranks, host)
        _add(out, (m, len(blueprint.stages[m]) - 1), "boundary", one)
        _add(out, (SINK, stage), "boundary", one)
    entered = _entered(blueprint, plan)
    for (m, s, _), messages in counts.moved.items():
        ranks = [(x, places.of_group(x.group).ranks) for x in messages]
        spent = sum(x.times * (processor_seconds(x, n, host) + host.unit_s) for x, n in ranks if n > 1)
        if entered[m, s]:
            _add(out, (m, s), "data ranks", spent / entered[m, s])
    return out


def _entered(blueprint: Blueprint, plan: StepPlan) -> Counter[tuple[str, int]]:
    """By (module, stage), how many forwards and backwards each of its ranks has in a step."""
    out: Counter[tuple[str, int]] = Counter()
    for program in blueprint.schedule(plan.active).programs:
        found = Counter((a.module, a.stage) for a in program if a.kind in ENTERING)
        out |= found  # the programs of a stage have equally many
    return out


def _add(out: Extra, at: tuple[str, int], what: What, seconds: float) -> None:
    for kind in ENTERING:
        if (*at, kind) in out:
            out[*at, kind][what] += seconds


def update_seconds(blueprint: Blueprint, counts: Counts, hardware: Hardware) -> dict[tuple[str, str], float]:
    """Seconds of a step after its last backward, by (module, what), on the rank that takes longest: the
    update, gathers of weights that stay whole, the step's message. Of one rank that has a core to itself."""
    places, host = places_of(blueprint, hardware), hardware.host
    out: dict[tuple[str, str], float] = {}
    for m in blueprint.modules:
        pp, stages = blueprint.layouts[m].pp, range(len(blueprint.stages[m]))
        by_rank: list[defaultdict[tuple[str, str], float]] = [defaultdict(float) for _ in range(pp)]
        for s in stages:
            own = by_rank[s % pp]
            work = counts.work.get((m, s, Kind.OPTIMIZER))
            if work is not None and (work.kernels or work.messages):
                weights = sum(len(unit) for unit in blueprint.weights(m, s))
                calls = weights * UPDATE_CALLS * hardware.kernels.launch_s
                own[m, "optimizer"] += price(work, places, hardware).seconds + calls
            if blueprint.uses[m].params == "replicated" and host is None:
                gathers = counts.moved.get((m, s, Kind.GATHER), ())
                own[m, "data ranks"] += sum(message_price(x, places, hardware)[0] for x in gathers)
        slowest = max(range(pp), key=lambda k: sum(by_rank[k].values()))
        out.update(by_rank[slowest])
    said = Message("all_gather", WORLD, float(NUMBERS * 8 * blueprint.world))
    out["", "update message"] = message_price(said, places, hardware)[0]
    if host is not None:
        out["", "step"] = host.step_s
    return out


def update_crowd(blueprint: Blueprint, module: str, hardware: Hardware) -> float:
    """How much longer an update takes because ranks share cores. module: "" for what all ranks do."""
    if hardware.host is None:
        return 1.0
    ranks = blueprint.layouts[module].size if module else blueprint.world
    return max(1.0, ranks / hardware.host.cores)


def processor_seconds_of(blueprint: Blueprint, plan: StepPlan, counts: Counts, hardware: Hardware) -> float:
    """Processor seconds of all ranks in a step, or of all devices where these are accelerators: linear in the
    figures of the hardware that are seconds."""
    costs = priced(blueprint, plan, counts, hardware).costs
    out = 0.0
    schedule = blueprint.schedule(plan.active)
    for program, ranks in zip(schedule.programs, schedule.ranks_of, strict=True):
        for a in program:
            if a.kind in COMPUTE:
                out += costs.seconds(a) * len(ranks) * costs.share.get(a.module, 1.0)
    for (m, _), seconds in update_seconds(blueprint, counts, hardware).items():
        out += seconds * (blueprint.layouts[m].size if m else blueprint.world)
    return out
