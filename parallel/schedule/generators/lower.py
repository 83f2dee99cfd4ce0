"""From the computations of each place to the actions of its ranks: adds transfers, parameters and groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from parallel.schedule.action import (
    BACKWARD_WEIGHT,
    BOUNDARY_BACKWARD,
    BOUNDARY_FORWARD,
    COMPUTE,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    Kind,
)
from parallel.schedule.generators.orders import Work
from parallel.schedule.generators.problem import Problem
from parallel.schedule.plan import (
    Place,
    SchedulePlan,
    compute_groups,
    gather_groups,
    parameter_groups,
    places,
)
from parallel.topology.directions import Directions
from parallel.topology.groups import WORLD, Group

StageKey = tuple[str, int]  # (module, stage)


def lower(
    problem: Problem,
    works: Mapping[Place, Sequence[Work]],
    *,
    ahead: int | None = None,
    late: Collection[str] = (),
) -> SchedulePlan:
    """The plan in which the ranks at each place do the `works` of that place, in order.

    A transfer is started right after the computation that makes its rows. Receives are at the head of each
    list: in_one_order() puts them, and what they meet, where they belong.

    ahead: SchedulePlan.ahead.
    late: modules whose gradients are summed at the end, because places come to their last backward in
        different orders.
    """
    where = places({m: u.layout for m, u in problem.modules.items()})
    distinct = list(dict.fromkeys(where.values()))
    number = {place: p for p, place in enumerate(distinct)}
    writer = _Writer(problem, late)
    return SchedulePlan(
        kind=problem.kind,
        modules=problem.modules,
        sink=problem.sink,
        active=problem.active,
        programs=tuple(writer.program(place, works[place]) for place in distinct),
        program_of={rank: number[place] for rank, place in where.items()},
        train=problem.options.train,
        ahead=ahead,
    )


class _Writer:
    """Writes the actions of each place."""

    def __init__(self, problem: Problem, late: Collection[str]) -> None:
        self.problem, self.modules, self.sink, self.late = problem, problem.modules, problem.sink, late
        self.active = problem.active
        self.sources = [m for m in self.modules if m != self.sink]
        # By what compute_groups() takes, for plans have many computations and few kinds of them.
        self.compute = {
            (m, kind, summed): compute_groups(m, u, kind, summed)
            for m, u in self.modules.items()
            for kind in COMPUTE
            for summed in (False, True)
        }
        self.gathered = {m: gather_groups(m, u) for m, u in self.modules.items()}
        self.parameters = {m: parameter_groups(m, u) for m, u in self.modules.items()}
        self.links = {
            m: Directions(
                forward=(Group("module", m, "pp", "forward"),),
                backward=(Group("module", m, "pp", "backward"),),
            )
            for m in self.modules
        }
        self.edges = {
            (s, stage): Directions(
                forward=(Group("edge", s, direction="forward", stage=stage),),
                backward=(Group("edge", s, direction="backward", stage=stage),),
            )
            for s in self.sources
            for stage in self.modules[s].enters
        }

    def program(self, place: Place, works: Sequence[Work]) -> tuple[Action, ...]:
        """The actions of a place, from what it computes."""
        final: dict[StageKey, int] = {}  # the last backward of each stage, by index in `works`
        end: dict[StageKey, int] = {}  # its last computation
        for k, w in enumerate(works):
            end[w.module, w.stage] = k
            if w.kind is not FORWARD:
                final[w.module, w.stage] = k
        stepwise = [key for key in end if self.modules[key[0]].params == "step" and self.gathered[key[0]]]
        out = [self._on_parameters(Kind.GATHER, key) for key in sorted(stepwise)]
        out += self._receives(place, works)
        for k, w in enumerate(works):
            key = (w.module, w.stage)
            last = final.get(key) == k
            groups = self.compute[w.module, w.kind, last and w.module not in self.late]
            at = (w.kind, w.module, w.microbatch, w.stage)
            out.append(Action(*at, last=last, span=w.span, groups=groups, paired=w.paired))
            if not w.paired:  # what a pair has made leaves after both
                begun = works[k - 1 : k + 1] if k and works[k - 1].paired else [w]
                out += [a for one in begun for a in self._after(one)]
            free = end[key] == k and key in stepwise
            if (last or free) and w.module not in self.late:
                out += self._closing(key, last, free)
        for key in sorted(end):
            if key[0] in self.late:
                out += self._closing(key, key in final, key in stepwise)
        if self.problem.options.optimizer and self.problem.options.train:
            out.append(Action(Kind.OPTIMIZER, self.sink, 0, groups=(WORLD,)))
        return tuple(out)

    def _closing(self, key: StageKey, after_last: bool, free: bool) -> list[Action]:
        """What a stage's parameters need after its last backward, and after its last computation."""
        use = self.modules[key[0]]
        late = after_last and key[0] in self.late
        sums = late and use.params != "each" and not use.frozen and bool(self.parameters[key[0]])
        kinds = [kind for kind, needed in ((Kind.GRAD_SYNC, sums), (Kind.FREE, free)) if needed]
        return [self._on_parameters(kind, key) for kind in kinds]

    def _on_parameters(self, kind: Kind, key: StageKey) -> Action:
        module, stage = key
        groups = {Kind.GATHER: self.gathered[module], Kind.GRAD_SYNC: self.parameters[module]}
        return Action(kind, module, 0, stage=stage, groups=groups.get(kind, ()))

    def _receives(self, place: Place, works: Sequence[Work]) -> list[Action]:
        """The receives that the works wait for and that no computation of this place starts."""
        pp = dict(zip(self.modules, place, strict=True))
        # The sources whose rows are made here, and the stages of the sink that read rows here.
        holds = {s for s in self.sources if pp[s] is not None and pp[s] == self.modules[s].layout.pp - 1}
        at = pp[self.sink]
        reads = set() if at is None else set(self.modules[self.sink].stages_at(at))
        return [a for w in works for a in self._before(w, holds, reads)]

    def _before(self, w: Work, holds: set[str], reads: set[int]) -> list[Action]:
        """The receives of one work."""
        if w.kind is FORWARD:
            out = [self._link(RECV_FORWARD, w, w.stage - 1)] if w.stage else []
            sources = [s for s in self._entering(w) if s not in holds]
            return out + [self._edge(BOUNDARY_FORWARD, s, w.stage, w.microbatch) for s in sources]
        if w.kind is not BACKWARD_WEIGHT:
            if w.stage + 1 < self.modules[w.module].stages:
                return [self._link(RECV_BACKWARD, w, w.stage + 1)]
            if w.module != self.sink:
                far = [s for s in self.modules[w.module].enters if s not in reads]
                return [self._edge(BOUNDARY_BACKWARD, w.module, s, i) for i in self._covered(w) for s in far]
        return []

    def _after(self, w: Work) -> list[Action]:
        """Transfers of what `w` has made."""
        if w.kind is FORWARD:
            if w.stage + 1 < self.modules[w.module].stages:
                return [self._link(SEND_FORWARD, w, w.stage + 1)]
            if w.module != self.sink:
                enters = self.modules[w.module].enters
                return [
                    self._edge(BOUNDARY_FORWARD, w.module, s, i) for i in self._covered(w) for s in enters
                ]
        elif w.kind is not BACKWARD_WEIGHT:
            out = [self._link(SEND_BACKWARD, w, w.stage - 1)] if w.stage else []
            sources = [s for s in self._entering(w) if not self.modules[s].frozen]
            return out + [self._edge(BOUNDARY_BACKWARD, s, w.stage, w.microbatch) for s in sources]
        return []

    def _entering(self, w: Work) -> list[str]:
        """The sources whose rows enter the sink in `w`."""
        if w.module != self.sink:
            return []
        return [
            s for s in self.sources if s in self.active[w.microbatch] and w.stage in self.modules[s].enters
        ]

    def _covered(self, w: Work) -> list[int]:
        """The micro-batches of a source's work that have items."""
        return [i for i in range(w.microbatch, w.microbatch + w.span) if w.module in self.active[i]]

    def _link(self, kind: Kind, w: Work, peer: int) -> Action:
        """A send or receive along the pipeline of w's module."""
        links = self.links[w.module]
        groups = links.backward if kind in (SEND_BACKWARD, RECV_BACKWARD) else links.forward
        return Action(kind, w.module, w.microbatch, w.stage, peer=peer, span=w.span, groups=groups)

    def _edge(self, kind: Kind, source: str, stage: int, microbatch: int) -> Action:
        """A boundary action."""
        edge = self.edges[source, stage]
        groups = edge.forward if kind is BOUNDARY_FORWARD else edge.backward
        return Action(kind, source, microbatch, stage, groups=groups)
