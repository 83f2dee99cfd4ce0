"""make_schedule: the plan of a step from layouts and a schedule's name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from parallel.schedule.action import COMPUTE, Kind
from parallel.schedule.costs import Costs
from parallel.schedule.lower import lower
from parallel.schedule.orders import PIPELINES, Work, windows
from parallel.schedule.plan import ModuleUse, Place, SchedulePlan, places
from parallel.schedule.refuse import check_ahead, check_modules, resolve
from parallel.schedule.simulate import simulate
from parallel.schedule.sources import Beat, Group, Slot, apart, beat, by_slot, groups, insert


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
        after 1F1B.
    modules: sources in the order that all ranks use, and the sink; each on its own ranks, the same as another
        module's, others, or partly the same.
    active: per micro-batch, the sources with items on any rank.
    ahead: for how many micro-batches a source on ranks of the sink may hold activations; None for as few as
        keep the pipeline full. A bound below that fills and drains the pipeline once for so many.
    batch: by source, for how many micro-batches it computes at once (1).
    costs: what orders that depend on time assume.
    optimizer: end with the update.

    Raises ValueError saying what was given, what is needed and the nearest that works.
    """
    batch = {m: (batch or {}).get(m, 1) for m in modules if m != sink}
    check_modules(modules, sink, active, batch)
    kind = resolve(kind, modules[sink].layout, len(active))
    alive = tuple(frozenset(a) for a in active)
    home = set(modules[sink].layout.ranks)
    job = _Job(
        kind,
        modules,
        sink,
        alive,
        beside=tuple(m for m in batch if home & set(modules[m].layout.ranks)),
        batch=batch,
        train=train,
    )
    unit = math.lcm(*(batch[m] for m in job.beside))
    works, size = job.sink_works([len(alive)]), unit
    if job.beside and train:
        pulse = beat(works[0])
        ahead = len(alive) if kind == "three_phase" else ahead or pulse.held(unit)
        quantum = math.lcm(unit, modules[sink].layout.pp if kind == "interleaved" else 1)
        if pulse.held(unit) > ahead:
            size = check_ahead(ahead, quantum, kind, unit)
            works = job.sink_works([min(size, len(alive) - i) for i in range(0, len(alive), size)])
        else:
            # The largest groups within the bound: the fewest moments at which all ranks meet.
            size = max(n for n in range(unit, ahead + unit, unit) if n == unit or pulse.held(n) <= ahead)
    elif job.beside:
        size = ahead or unit
    where = dict.fromkeys(places({m: u.layout for m, u in modules.items()}).values())
    pulse = beat(works[0])
    moments = _Moments(pulse, _starts(job, works, costs)) if job.beside else None
    lists = {place: job.works(place, works, size, pulse, moments) for place in where}
    return lower(kind, modules, sink, alive, lists, train=train, ahead=ahead, optimizer=optimizer)


@dataclass(frozen=True)
class _Job:
    """What make_schedule was asked for. beside: the sources that share ranks with the sink."""

    kind: str
    modules: Mapping[str, ModuleUse]
    sink: str
    active: tuple[frozenset[str], ...]
    beside: tuple[str, ...]
    batch: Mapping[str, int]
    train: bool

    def sink_works(self, sizes: Sequence[int]) -> list[list[Work]]:
        """The sink's works by pipeline rank; its pipeline is filled once for so many micro-batches each."""
        layout = self.modules[self.sink].layout
        frozen = {m for m, u in self.modules.items() if u.frozen}
        back = [self.train and (self.sink not in frozen or bool(a - frozen)) for a in self.active]
        out = []
        for r in range(layout.pp):
            order = windows(PIPELINES[self.kind], sizes, r, layout.pp, layout.vpp)
            works = [Work(k, self.sink, s, i) for k, s, i in order if k is Kind.FORWARD or back[i]]
            if self.sink in frozen:  # its weights need nothing: the whole backward is that of its inputs
                works = [w for w in works if w.kind is not Kind.BACKWARD_WEIGHT]
            out.append(works)
        return out

    def works(
        self,
        place: Place,
        sink_works: Sequence[Sequence[Work]],
        size: int,
        pulse: Beat,
        moments: _Moments | None,
    ) -> list[Work]:
        """Everything that the ranks at a place compute, in order."""
        pp = dict(zip(self.modules, place, strict=True))
        here = {m: self.modules[m].stages_at(r) for m, r in pp.items() if r is not None and m != self.sink}
        parts: list[tuple[Slot, float, list[Work]]] = []
        for group in groups(len(self.active), size, self.train) if moments else []:
            assert moments is not None
            found = [
                w
                for m, stages in here.items()
                if m in self.beside and not (group.backward and self.modules[m].frozen)
                for w in group.works(m, stages, self.active, self.batch[m])
            ]
            if found:
                parts.append((*moments.of(group), found))
        parts.sort(key=lambda part: part[0])
        r = pp[self.sink]
        if r is not None:
            if moments is None:
                return list(sink_works[r])
            return insert(sink_works[r], moments.starts[r], [(t, ws) for _, t, ws in parts])
        lists = {m: self._apart(m, stages, pulse) for m, stages in here.items() if m not in self.beside}
        return by_slot([*lists.values(), [(slot, w) for slot, _, ws in parts for w in ws]])

    def _apart(self, source: str, stages: Sequence[int], pulse: Beat) -> list[tuple[Slot, Work]]:
        use, size, ahead = self.modules[source], self.batch[source], self.kind != "sequential"
        out = []
        for s in stages:
            lead = use.stages - s if ahead else 0
            out += apart(source, s, lead, pulse, self.active, size, self.train and not use.frozen)
        return out


@dataclass(frozen=True)
class _Moments:
    """When groups of sources' works take place: the sink running alone, cut at one second on all its ranks.

    starts: by pipeline rank, when each of the sink's works starts; begin, finish: by micro-batch, when its
    forward at the sink's first stage starts, and its backward there ends.
    """

    pulse: Beat
    timed: tuple[list[list[float]], dict[int, float], dict[int, float]]

    @property
    def starts(self) -> list[list[float]]:
        return self.timed[0]

    def of(self, group: Group) -> tuple[Slot, float]:
        """(slot, second) of a group."""
        _, begin, finish = self.timed
        if not group.backward:
            return self.pulse.forward_slot(group.start, 0), begin[group.start]
        final = max(i for i in range(group.start, group.stop) if i in finish)
        return self.pulse.backward_slot(final), finish[final]


def _starts(
    job: _Job, works: Sequence[Sequence[Work]], costs: Costs | None
) -> tuple[list[list[float]], dict[int, float], dict[int, float]]:
    """The times that _Moments holds, from a simulation of the sink alone."""
    use = {job.sink: job.modules[job.sink]}
    alone = (frozenset[str](),) * len(job.active)
    line = simulate(lower(job.kind, use, job.sink, alone, {(r,): w for r, w in enumerate(works)}), costs)
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
            if a.stage == 0 and a.kind is Kind.FORWARD:
                begin[a.microbatch] = start
            elif a.stage == 0 and a.kind is not Kind.BACKWARD_WEIGHT:
                finish[a.microbatch] = end
    return starts, begin, finish
