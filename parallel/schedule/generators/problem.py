"""A job to schedule: the module graph, where its modules live, and what each place computes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from parallel.schedule.action import BACKWARD_WEIGHT, COMPUTE, FORWARD
from parallel.schedule.generators.fill import TRIED, Spare, fill
from parallel.schedule.generators.lower import lower
from parallel.schedule.generators.orders import PIPELINES, Work, windows
from parallel.schedule.generators.sources import (
    Beat,
    Group,
    Slot,
    apart,
    beat,
    by_slot,
    chunks,
    groups,
    insert,
)
from parallel.schedule.plan import ModuleUse, Place, SchedulePlan, places
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import simulate

Pipelines = Sequence[Sequence[Work]]  # the sink's works by pipeline rank


@dataclass(frozen=True)
class Job:
    """What make_schedule was asked for, with one schedule kind that is not "auto"."""

    kind: str
    modules: Mapping[str, ModuleUse]
    sink: str
    active: tuple[frozenset[str], ...]
    batch: Mapping[str, int]
    train: bool
    optimizer: bool

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The sources that share ranks with the sink."""
        home = set(self.modules[self.sink].layout.ranks)
        return tuple(m for m in self.batch if home & set(self.modules[m].layout.ranks))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All distinct places of ranks."""
        return tuple(dict.fromkeys(places({m: u.layout for m, u in self.modules.items()}).values()))

    def sink_works(self, sizes: Sequence[int]) -> list[list[Work]]:
        """The sink's works by pipeline rank; its pipeline is filled once for so many micro-batches each."""
        layout = self.modules[self.sink].layout
        frozen = {m for m, u in self.modules.items() if u.frozen}
        back = [self.train and (self.sink not in frozen or bool(a - frozen)) for a in self.active]
        out = []
        for r in range(layout.pp):
            order = windows(PIPELINES[self.kind], sizes, r, layout.pp, layout.vpp)
            works = [Work(k, self.sink, s, i) for k, s, i in order if k is FORWARD or back[i]]
            if self.sink in frozen:  # its weights need nothing: the whole backward is that of its inputs
                works = [w for w in works if w.kind is not BACKWARD_WEIGHT]
            out.append(works)
        return out

    def apart_plan(self, works: Pipelines) -> SchedulePlan:
        """The plan where no source shares a rank with the sink."""
        pulse = beat(works[0])
        lists = {}
        for place in self.places:
            r, here = self._at(place)
            lists[place] = works[r] if r is not None else by_slot(self._apart(here, pulse))
        return self._lower(lists, None)

    def beside_plan(self, works: Pipelines, times: Times, size: int, lead: int, ahead: int) -> SchedulePlan:
        """The plan where sources on ranks of the sink compute groups of `size` micro-batches, `lead` forwards
        of the sink early."""
        pulse = beat(works[0])
        moments = [
            (times.slot(group, pulse, lead), times.second(group, lead), group)
            for group in groups(len(self.active), size, self.train)
            if not group.backward or times.returns(group)
        ]
        moments.sort(key=lambda moment: moment[0])
        lists: dict[Place, Sequence[Work]] = {}
        for place in self.places:
            r, here = self._at(place)
            parts = [(slot, second, self._of_group(group, here)) for slot, second, group in moments]
            if r is not None:
                lists[place] = insert(works[r], times.starts[r], [(t, found) for _, t, found in parts])
            else:
                together = [(slot, w) for slot, _, found in parts for w in found]
                lists[place] = by_slot([*self._apart(here, pulse), together])
        return self._lower(lists, ahead)

    def fill_plans(self, works: Pipelines, times: Times, ahead: int, costs: Costs) -> list[SchedulePlan]:
        """Plans where sources on ranks of the sink compute in its idle time, by different rules."""
        forwards = [
            Work(FORWARD, m, 0, i, span)
            for m in self.beside
            for i, span in chunks(0, len(self.active), self.batch[m], self.active, m)
        ]
        forwards.sort(key=lambda w: w.microbatch)  # stable: the sources' order within a micro-batch
        learn = [m for m in self.beside if self.train and not self.modules[m].frozen]
        stages = self.modules[self.sink].stages
        enters = {m: self.modules[m].enters for m in self.beside}
        spare = Spare(works, times.starts, stages, forwards, learn, enters, self.active, ahead, costs)
        plans = []
        for rules in TRIED:
            lists = fill(spare, rules)
            by_place = {place: lists[self._at(place)[0] or 0] for place in self.places}
            plans.append(self._lower(by_place, ahead, late=self.beside))
        return plans

    def _at(self, place: Place) -> tuple[int | None, dict[str, range]]:
        """(pipeline rank of the sink, stages of each source) at a place."""
        pp = dict(zip(self.modules, place, strict=True))
        here = {m: self.modules[m].stages_at(r) for m, r in pp.items() if r is not None and m != self.sink}
        return pp[self.sink], here

    def _apart(self, here: Mapping[str, range], pulse: Beat) -> list[list[tuple[Slot, Work]]]:
        """Works at a place of the sources that share no rank with the sink."""
        out = []
        for m, stages in here.items():
            use = self.modules[m]
            if m in self.beside:
                continue
            for s in stages:
                lead = use.stages - s if self.kind != "sequential" else 0
                back = self.train and not use.frozen
                out.append(apart(m, s, lead, pulse, self.active, self.batch[m], back))
        return out

    def _of_group(self, group: Group, here: Mapping[str, range]) -> list[Work]:
        """What the sources at a place compute of a group."""
        doing = [m for m in here if m in self.beside and not (group.backward and self.modules[m].frozen)]
        return [w for m in doing for w in group.works(m, here[m], self.active, self.batch[m])]

    def _lower(
        self, lists: Mapping[Place, Sequence[Work]], ahead: int | None, late: Sequence[str] = ()
    ) -> SchedulePlan:
        return lower(
            self.kind,
            self.modules,
            self.sink,
            self.active,
            lists,
            train=self.train,
            ahead=ahead,
            optimizer=self.optimizer,
            late=late,
        )


@dataclass(frozen=True)
class Times:
    """When the sink's works take place if it runs alone, in seconds.

    starts: by pipeline rank, of each work; begin, finish: by micro-batch, when its forward at the first stage
    starts, and when its backward there ends.
    """

    starts: Sequence[Sequence[float]]
    begin: Mapping[int, float]
    finish: Mapping[int, float]

    @staticmethod
    def of(job: Job, works: Pipelines, costs: Costs | None) -> Times:
        """From a simulation."""
        use = {job.sink: job.modules[job.sink]}
        alone = (frozenset[str](),) * len(job.active)
        lists: dict[Place, Sequence[Work]] = {(r,): w for r, w in enumerate(works)}
        line = simulate(lower(job.kind, use, job.sink, alone, lists, train=job.train), costs)
        starts: list[list[float]] = [[] for _ in works]
        begin: dict[int, float] = {}
        finish: dict[int, float] = {}
        for p, actions in enumerate(line.plan.programs):
            r = line.plan.places[p][0]
            assert r is not None
            for a, start, end in zip(actions, line.start[p], line.end[p], strict=True):
                if a.kind not in COMPUTE:
                    continue
                starts[r].append(start)
                if a.stage == 0 and a.kind is FORWARD:
                    begin[a.microbatch] = start
                elif a.stage == 0 and a.kind is not BACKWARD_WEIGHT:
                    finish[a.microbatch] = end
        return Times(starts, begin, finish)

    def returns(self, group: Group) -> list[int]:
        """The micro-batches of a group that have a gradient."""
        return [i for i in range(group.start, group.stop) if i in self.finish]

    def second(self, group: Group, lead: int) -> float:
        """At which second all ranks are cut for a group."""
        if group.backward:
            return self.finish[self.returns(group)[-1]]
        return self.begin[max(0, group.start - lead)]

    def slot(self, group: Group, pulse: Beat, lead: int) -> Slot:
        """The same in the order of the sink's first stage."""
        if group.backward:
            return pulse.backward_slot(self.returns(group)[-1])
        return pulse.forward_slot(group.start, lead)
