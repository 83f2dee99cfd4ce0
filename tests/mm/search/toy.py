"""A made-up model for searches: what its modules ask is drawn, what its candidates cost is simulated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mm.config.outline import SINK
from mm.search.bound import Demand, Floor, Open, floor_of
from mm.search.candidate import Block, Candidate, Choice, Degrees
from mm.search.space import ANY, Space
from mm.search.tree import Again, Node, Tree
from parallel.schedule import ModuleUse, ScheduleOptions, make_schedule
from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Kind
from parallel.schedule.checker.memory import Memory, peaks
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import simulate
from parallel.topology.layout import make_layout

POLICIES = ("step", "zero3")


def least(demands: list[Demand]) -> Demand | None:
    """The least that any of these asks, stage by stage."""
    if not demands:
        return None
    return Demand(
        demands[0].pp,
        *(
            tuple(map(min, zip(*(getattr(d, name) for d in demands), strict=True)))
            for name in ("forward", "backward", "early", "held", "kept")
        ),
        least=1.0,
    )


@dataclass
class Toy:
    """seed: of all draws. A layout costs its share of the work, times a factor that is drawn."""

    seed: int
    space: Space
    simulated: int = 0

    def least(self, module: str, size: int, degrees: Degrees | None) -> float:
        return self.space.batch / size  # the least factor is 1

    def demand(self, module: str, choice: Choice, m: int, again: Again, kind: str) -> Demand | None:
        d, size = choice.degrees, choice.block.size
        if choice.data_parallel == ANY:
            found = [self.demand(module, choice._replace(data_parallel=p), m, again, kind) for p in POLICIES]
            return least([x for x in found if x is not None])
        draw = random.Random(f"{self.seed} {module} {size} {d} {choice.data_parallel} {m} {again}")
        if draw.random() < 0.05:
            return None
        stages = d.pp * d.vpp
        one = self.space.batch / size * d.pp / m / stages
        early = 0.5 if kind == "zero_bubble" and module == SINK else 1.0
        forward = tuple(one * draw.choice([0.5, 0.6, 1.0]) for _ in range(stages))
        backward = tuple(one * draw.choice([0.5, 0.7, 1.5]) * (1 + len(again)) for _ in range(stages))
        return Demand(
            pp=d.pp,
            forward=forward,
            backward=backward,
            early=tuple(early * b for b in backward),
            held=tuple(draw.choice([1.0, 2.0, 3.0]) / d.model for _ in range(d.pp)),
            kept=tuple(draw.choice([1.0, 2.0]) / (m * (1 + len(again))) for _ in range(stages)),
            least=1.0,
        )

    def floors(
        self, block: Block, degrees: Degrees, policies: Sequence[str], numbers: Sequence[int], again: Again
    ) -> list[list[Floor]]:
        kind = "zero_bubble" if degrees.pp > 1 else "1f1b"
        found = [
            [self.demand(SINK, Choice(block, degrees, p), m, again, kind) for p in policies] for m in numbers
        ]
        return [[floor_of(d, m) for d in row if d is not None] for m, row in zip(numbers, found, strict=True)]

    def options(
        self, module: str, block: Block, degrees: Sequence[Degrees], m: int, again: Again
    ) -> Open | None:
        found = [self.demand(module, Choice(block, d, ANY), m, again, "1f1b") for d in degrees]
        some = [d for d in found if d is not None]
        if not some:
            return None
        seconds = min(min(d.work(p, m) for p in range(d.pp)) for d in some)
        return Open(block, seconds, min(min(d.held) for d in some), min(d.share for d in some))

    def outcome(self, candidate: Candidate) -> tuple[float, float] | None:
        """(seconds, bytes) by the schedule's own actions; None where there is no schedule."""
        self.simulated += 1
        uses, compute = {}, dict[tuple[str, Kind] | tuple[str, int, Kind], float]()
        kept, demands = dict[str | tuple[str, int], float](), dict[str, Demand]()
        draw = random.Random(f"{self.seed} {candidate}")
        for module, choice in candidate.choices:
            args = choice, candidate.microbatches, candidate.recompute, candidate.kind
            demand = self.demand(module, *args)
            if demand is None:
                return None
            demands[module] = demand
            uses[module] = ModuleUse(make_layout(module, candidate.world, choice.mapping(candidate.world)))
            uses[module] = ModuleUse(uses[module].layout, params="step")
            for s in range(len(demand.forward)):
                compute[module, s, FORWARD] = demand.forward[s]
                compute[module, s, BACKWARD] = demand.backward[s]
                compute[module, s, BACKWARD_INPUT] = demand.early[s]
                compute[module, s, BACKWARD_WEIGHT] = demand.backward[s] - demand.early[s]
                kept[module, s] = demand.kept[s]
        kinds = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.BOUNDARY_FORWARD, Kind.BOUNDARY_BACKWARD)
        transfer = {(m, k): draw.choice([0.0, 0.01, 0.1]) for m in uses for k in kinds}
        costs = Costs(compute, transfer)
        active = [set(uses) - {SINK}] * candidate.microbatches
        options = ScheduleOptions(costs=costs, optimizer=True)
        try:
            plan = make_schedule(candidate.kind, uses, sink=SINK, active=active, options=options)
        except ValueError:
            return None
        held = 0.0
        for peak in peaks(plan, Memory(kept)):
            place = dict(zip(plan.modules, plan.places[plan.program_of[peak.ranks[0]]], strict=True))
            own = sum(demands[m].held[pp] for m, pp in place.items() if pp is not None)
            held = max(held, own + peak.bytes)
        return simulate(plan, costs).seconds, held


def every(tree: Tree) -> Iterator[Node]:
    """All leaves that are possible, one by one."""
    open_ = list(tree.roots())
    while open_:
        node = open_.pop()
        if node.leaf:
            yield node
        else:
            open_ += [below for below in tree.expand(node) if below.bound < float("inf")]


def priced(tree: Tree, toy: Toy, limit: float) -> Mapping[Node, float]:
    """What every candidate within the limit costs."""
    out = {}
    for leaf in every(tree):
        found = toy.outcome(tree.candidate(leaf))
        if found is not None and found[1] <= limit:
            out[leaf] = found[0]
    return out
