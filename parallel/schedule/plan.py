"""A schedule for all ranks, as data.

The place of a rank is its pipeline rank in every module. Ranks at the same place do the same actions in the
same order, so they share one list of actions, a program. A job of 1,024 ranks has as many programs as it has
distinct places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from parallel.schedule.action import BACKWARD, BACKWARD_WEIGHT, Action, Kind
from parallel.topology.data_parallel import Params, Shards, Sums
from parallel.topology.groups import COMPUTE, Group, along, edge_ranks, parameter_axes, size_along
from parallel.topology.layout import Layout


@dataclass(frozen=True)
class ModuleUse:
    """A module as a schedule needs it.

    frozen: its weights have no gradients. Gradients still pass through a frozen language model to encoders.
    params: when its weights are whole. "each": each forward and backward gathers them, as FSDP does. "step":
        GATHER and FREE do, once a step. "replicated": before the step and after it too.
    sums: when its gradients are summed over the data ranks: in each "backward", or once a "step". The last
        backward does that, or GRAD_SYNC where places come to their last backward in different orders.
    experts: whether it has any, which data ranks of their own (edp) hold. Expert degrees say so too.
    shards: into how many shards its weights are split; None: as many as there are data ranks.
    layers: how many it has, so that more stages than layers are refused; None if not known.
    enters: for a source, the stages of the sink that its rows enter. Each gets rows of its own.
    """

    layout: Layout
    frozen: bool = False
    params: Params = "each"
    sums: Sums = "step"
    experts: bool = False
    shards: Shards | None = None
    layers: int | None = None
    enters: tuple[int, ...] = (0,)

    def sums_in(self, kind: Kind, last: bool) -> bool:
        """Whether a computation sums gradients over the data ranks. last: it is the stage's last backward."""
        return kind in (BACKWARD, BACKWARD_WEIGHT) and not self.frozen and (last or self.sums == "backward")

    @property
    def stages(self) -> int:
        """How many virtual stages: pp x vpp."""
        return self.layout.pp * self.layout.vpp

    def stages_at(self, pp: int) -> range:
        """The virtual stages on pipeline rank `pp`."""
        return range(pp, self.stages, self.layout.pp)


Place = tuple[int | None, ...]  # by module, the pipeline rank; None for a module that is not on the rank


@dataclass(frozen=True)
class SchedulePlan:
    """One step of all ranks.

    kind: the schedule's name.
    modules: sources (encoders), then the sink (the language model), in the order that all ranks use.
    active: by micro-batch, the sources that have items in it on any rank. All ranks skip the others.
    programs: lists of actions.
    program_of: by rank, the index of its program.
    train: whether the step has backwards.
    ahead: for how many micro-batches a colocated source may hold activations at once; None without a bound.
    memo: by name, what is worked out from the plan once.
    """

    kind: str
    modules: Mapping[str, ModuleUse]
    sink: str
    active: tuple[frozenset[str], ...]
    programs: tuple[tuple[Action, ...], ...]
    program_of: Mapping[int, int]
    train: bool = True
    ahead: int | None = None
    memo: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    _sets: dict[Group, tuple[frozenset[int], ...]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    @property
    def microbatches(self) -> int:
        return len(self.active)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(m for m in self.modules if m != self.sink)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that have something to do, in order."""
        return tuple(self.program_of)

    @cached_property
    def ranks_of(self) -> tuple[tuple[int, ...], ...]:
        """By program, the ranks that run it."""
        out: list[list[int]] = [[] for _ in self.programs]
        for rank, p in self.program_of.items():
            out[p].append(rank)
        return tuple(tuple(ranks) for ranks in out)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """By program, the place of its ranks."""
        where = places({m: u.layout for m, u in self.modules.items()})
        return tuple(where[ranks[0]] for ranks in self.ranks_of)

    def actions(self, rank: int) -> tuple[Action, ...]:
        """The actions of `rank`, in order; none if no module is on it."""
        return self.programs[self.program_of[rank]] if rank in self.program_of else ()

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        """(program, action) of all programs, in order."""
        return ((p, a) for p, actions in enumerate(self.programs) for a in actions)

    @property
    def n_actions(self) -> int:
        """Actions of all ranks together."""
        return sum(len(self.programs[p]) for p in self.program_of.values())

    def hosts(self, module: str, stage: int) -> frozenset[int]:
        """The programs of the ranks that have a virtual stage."""
        at = list(self.modules).index(module)
        pp = stage % self.modules[module].layout.pp
        return frozenset(p for p, place in enumerate(self.places) if place[at] == pp)

    def ends(self, source: str, stage: int) -> tuple[frozenset[int], frozenset[int]]:
        """(programs with the source's last stage, programs with the sink's `stage`): the ends of an edge."""
        return self.hosts(source, self.modules[source].stages - 1), self.hosts(self.sink, stage)

    def entering(self, stage: int) -> tuple[str, ...]:
        """The sources whose rows enter the sink at `stage`."""
        return tuple(s for s in self.sources if stage in self.modules[s].enters)

    def learns(self, module: str, microbatch: int) -> bool:
        """Whether a backward follows the forward of a module in a micro-batch.

        It does for a source that has items and is not frozen, and for a sink that is not frozen. It also does
        for a frozen sink if such a source needs gradients through it.
        """
        if not self.train:
            return False
        if module != self.sink:
            return module in self.active[microbatch] and not self.modules[module].frozen
        if not self.modules[module].frozen:
            return True
        return any(not self.modules[s].frozen for s in self.active[microbatch])

    def members(self, group: Group, rank: int) -> tuple[int, ...]:
        """The ranks of the group of this name that `rank` is in."""
        return next(ranks for ranks in self.instances(group) if rank in ranks)

    def instances(self, group: Group) -> tuple[tuple[int, ...], ...]:
        """All process groups of a name, each as its ranks."""
        if group.scope == "world":
            return (self.ranks,)
        if group.scope == "edge":
            source, sink = self.modules[group.module].layout, self.modules[self.sink].layout
            return (edge_ranks(source, sink, group.stage),)
        use = self.modules[group.module]
        return along(use.layout, group.axis, use.shards)

    def program_sets(self, group: Group) -> tuple[frozenset[int], ...]:
        """The distinct sets of programs that groups of a name join; members must agree on an order."""
        if group not in self._sets:
            sets = {frozenset(self.program_of[r] for r in ranks) for ranks in self.instances(group)}
            self._sets[group] = tuple(sorted(sets, key=sorted))
        return self._sets[group]


def places(layouts: Mapping[str, Layout]) -> Mapping[int, Place]:
    """The place of every rank that has a module."""
    return _places(tuple((x.ranks, x.pp) for x in layouts.values()))


@lru_cache(maxsize=32)
def _places(modules: tuple[tuple[tuple[int, ...], int], ...]) -> Mapping[int, Place]:
    """places(), from the ranks and the pipeline ranks of each module."""
    out: dict[int, list[int | None]] = {r: [] for r in sorted({r for ranks, _ in modules for r in ranks})}
    for n, (ranks, pp) in enumerate(modules):
        per_stage = len(ranks) // pp
        for i, rank in enumerate(ranks):
            out[rank].append(i // per_stage)
        for row in out.values():
            if len(row) == n:
                row.append(None)
    return {rank: tuple(row) for rank, row in out.items()}


def compute_groups(module: str, use: ModuleUse, kind: Kind, summed: bool) -> tuple[Group, ...]:
    """The groups whose collectives a computation of a module runs, in order.

    summed: whether it completes the sums of the step, as the last backward does where GRAD_SYNC does not.
    Only then are shards summed over their replicas.
    """
    axes = [a for a in COMPUTE if getattr(use.layout, a) > 1]
    sums = use.sums_in(kind, summed)
    moved = _data_groups(module, use, shard=sums or use.params == "each", replica=sums and summed)
    return (*moved, *(Group("module", module, a) for a in axes))


def gather_groups(module: str, use: ModuleUse) -> tuple[Group, ...]:
    """The groups over which whole weights are gathered."""
    return _data_groups(module, use, shard=True, replica=False)


def parameter_groups(module: str, use: ModuleUse) -> tuple[Group, ...]:
    """The groups over which weights are gathered and gradients summed: the data ranks (dp x cp), and edp for
    experts that are replicated differently."""
    return _data_groups(module, use, shard=True, replica=True)


def _data_groups(module: str, use: ModuleUse, *, shard: bool, replica: bool) -> tuple[Group, ...]:
    """Groups of several data ranks: those that share a copy of the weights, those that have equal shards."""
    layout = use.layout
    experts = use.experts or layout.ep * layout.etp > 1
    axes = [
        axis
        for of_view in parameter_axes(layout, use.shards, experts=experts)
        for axis, wanted in zip(of_view, (shard, replica), strict=True)
        if axis and wanted and size_along(layout, axis, use.shards) > 1
    ]
    return tuple(Group("module", module, axis) for axis in axes)
