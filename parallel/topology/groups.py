"""The process groups of a job: their names, their ranks and the order in which they are made. Pure.

A plan names the groups that its actions use; a job makes exactly those. Every rank derives all groups from
the layouts alone, so names, ranks and order are equal everywhere (law 4). A group of one rank does not exist.
Groups of one lane that have the same ranks in the same order share a communicator.

>>> llm = Layout("llm", (0, 1, 2, 3), tp=2, pp=2)
>>> plan = group_plan({"llm": llm}, world=4)
>>> for family in plan.families:
...     print(family.name, family.groups)
llm.edp ((0, 1), (2, 3))
llm.tp ((0, 1), (2, 3))
llm.stage ((0, 1), (2, 3))
llm.pp.forward ((0, 2), (1, 3))
llm.pp.backward ((0, 2), (1, 3))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from parallel.topology.data_parallel import Shards
from parallel.topology.layout import Layout

Scope = Literal["module", "edge", "world"]
Direction = Literal["", "forward", "backward"]
Ranks = tuple[int, ...]
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
PARAMETERS = ("data", "edp")  # axes over which parameters are gathered and gradients summed
# The two parts of such an axis where weights have several shards, and several ranks have each of them.
SHARD, REPLICA = "_shard", "_replica"
COMPUTE = ("tp", "cp", "ep", "etp")
BETWEEN = ("stage", "ends")  # not axes of a view, but sets of ranks that exchange messages between steps


class Group(NamedTuple):
    """The name of a process group; GroupPlan.named and SchedulePlan.instances() give the ranks.

    scope: "module": the ranks along `axis` of `module`'s layout. "edge": all ranks at either end of the edge
        from `module` to the sink's `stage`. "world": all ranks of the job. Because the scope is a field of
        its own, a module may have any name.
    axis: an axis of the layout, or "data" (dp x cp: replicas of the dense weights), "stage" (all ranks of a
        pipeline rank), "ends" (the first and the last rank of a pipeline, which share tied weights). "data"
        and "edp" in two parts (data_axes) are "data_shard" (ranks that share one copy of the weights) and
        "data_replica" (ranks that have the same shard), and so for edp.
    direction: of the axis "pp" and of edges, which have a group for each direction.
    """

    scope: Scope
    module: str = ""
    axis: str = ""
    direction: Direction = ""
    stage: int = 0

    def __str__(self) -> str:
        head = self.scope if self.scope != "module" else ""
        stage = str(self.stage) if self.stage else ""
        return ".".join(part for part in (head, self.module, stage, self.axis, self.direction) if part)

    @property
    def lane(self) -> str:
        """What the operations of a communicator have in common: all members issue those of one lane in one
        order, so groups of one lane and the same ranks may share a communicator.

        "compute": collectives inside a computation, which goes on when they are done. A forward issues them
        in the order of its code; a backward in the reverse order, since autograd runs nodes by descending
        number. "parameters": gathers of parameters and sums of gradients, which run beside computations, in
        the order in which FSDP's hooks issue them. "world": messages between steps, which the main thread
        issues module by module. Each direction of a pipeline and of an edge is a lane of its own.
        """
        if self.scope == "world" or self.axis in BETWEEN:
            return "world"
        if self.axis.removesuffix(SHARD).removesuffix(REPLICA) in PARAMETERS:
            return "parameters"
        return "compute" if self.scope == "module" and not self.direction else str(self)

    @property
    def kind(self) -> str:
        """The lane, with all pipelines counted as "pipelines" and all edges as "edges"."""
        if not self.direction:
            return self.lane
        return "edges" if self.scope == "edge" else "pipelines"


WORLD = Group("world")


class Family(NamedTuple):
    """Groups of one name that are made together.

    groups: disjoint; those that share a communicator of an earlier family are left out.
    """

    name: Group
    groups: tuple[Ranks, ...]


@dataclass(frozen=True)
class GroupPlan:
    """All process groups of a job.

    world: how many ranks the job has.
    named: by name, in order, the groups of more than one rank, each as its ranks in order. Groups of one
        name are disjoint. Names without such a group are left out.
    """

    world: int
    named: Mapping[Group, tuple[Ranks, ...]]

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The groups that have to be made, in order; the default group is not among them."""
        have = {(WORLD.lane, tuple(range(self.world)))}
        found = []
        for name, groups in self.named.items():
            new = tuple(g for g in groups if (name.lane, g) not in have)
            have.update((name.lane, g) for g in new)
            if new:
                found.append(Family(name, new))
        return tuple(found)

    def of_rank(self, rank: int) -> dict[Group, Ranks]:
        """By name, in order, the group that `rank` is in; names without one are left out."""
        found = ((name, next((g for g in groups if rank in g), None)) for name, groups in self.named.items())
        return {name: ranks for name, ranks in found if ranks is not None}

    def most_by_kind(self) -> dict[str, int]:
        """By kind, how many communicators the rank has that has the most of that kind; with "all" of them."""
        held: dict[str, Counter[int]] = {"all": Counter()}
        for name, groups in [(WORLD, self.named.get(WORLD, ())), *self.families]:
            members = [r for ranks in groups for r in ranks]
            held.setdefault(name.kind, Counter()).update(members)
            held["all"].update(members)
        return {kind: max(count.values()) for kind, count in held.items() if count}

    def crossing(self, node_size: int) -> dict[Group, int]:
        """By name, how many of its groups have ranks of several nodes, where some have."""
        spread = {
            name: sum(len({r // node_size for r in ranks}) > 1 for ranks in groups)
            for name, groups in self.named.items()
        }
        return {name: n for name, n in spread.items() if n}


def group_plan(
    layouts: Mapping[str, Layout],
    *,
    world: int,
    edges: Sequence[tuple[str, int]] = (),
    sink: str = "",
    tied: Collection[str] = (),
    experts: Collection[str] | None = None,
    shards: Mapping[str, Shards] | None = None,
) -> GroupPlan:
    """Derive all groups of a job; O(ranks x names).

    layouts: by module, in the order of the job. edges: (source, stage of the sink), in order. sink: the
    module that edges lead to. tied: modules whose first and last stage share weights. experts: modules that
    have experts; None: all may have some. shards: into how many shards modules' weights are split, where that
    is not as many as there are data ranks.
    """
    named: dict[Group, tuple[Ranks, ...]] = {WORLD: (tuple(range(world)),)}
    for module, layout in layouts.items():
        split = None if shards is None else shards.get(module)
        own = parameter_axes(layout, split, experts=experts is None or module in experts)
        for name in _module_names(module, own, module in tied):
            if size_along(layout, name.axis, split) > 1:
                named[name] = along(layout, name.axis, split)
    for source, stage in edges:
        ranks = edge_ranks(layouts[source], layouts[sink], stage)
        named |= {Group("edge", source, "", way, stage): (ranks,) for way in DIRECTIONS}
    # All groups of a name have one size.
    return GroupPlan(world, {name: groups for name, groups in named.items() if len(groups[0]) > 1})


def _module_names(module: str, parameters: Iterable[DataAxes], tied: bool) -> Iterator[Group]:
    """The groups of a module, in order. parameters: parameter_axes()."""
    own = [axis for axes in parameters for axis in axes if axis]
    for axis in (*own, *COMPUTE, *(BETWEEN if tied else BETWEEN[:1])):
        yield Group("module", module, axis)
    for way in DIRECTIONS:
        yield Group("module", module, "pp", way)


class DataAxes(NamedTuple):
    """Axes of groups over the data ranks of a weight; empty where each has one rank.

    shard: the ranks that share one copy of it: gathers, and sums into shards. replica: the ranks that have
    the same shard: sums of shards.
    """

    shard: str
    replica: str


def data_axes(layout: Layout, axis: str, shards: Shards | None = None) -> DataAxes:
    """How the data ranks of a view are split. axis: "data" or "edp". shards: None: as many as ranks."""
    ranks, n = size_along(layout, axis), _shards_along(layout, axis, shards)
    if n == ranks:
        return DataAxes(axis, "")
    return DataAxes("", axis) if n == 1 else DataAxes(axis + SHARD, axis + REPLICA)


def parameter_axes(layout: Layout, shards: Shards | None, *, experts: bool) -> list[DataAxes]:
    """data_axes() of a module's dense weights and, where they have data ranks of their own, of its experts.

    experts: whether it has any.
    """
    # Only where a model-parallel axis is on are experts replicated differently from the dense weights.
    folded = experts and max(layout.tp, layout.ep, layout.etp) > 1
    return [data_axes(layout, axis, shards) for axis in (PARAMETERS if folded else PARAMETERS[:1])]


def _shards_along(layout: Layout, axis: str, shards: Shards | None) -> int:
    """Shards of a weight whose data ranks are those of `axis`."""
    if shards is None:
        return size_along(layout, axis)
    return shards.dense if axis == "data" else shards.expert


def size_along(layout: Layout, axis: str, shards: Shards | None = None) -> int:
    """Ranks of each group along the axis of a Group. shards: of the module's weights, as in data_axes()."""
    whole = axis.removesuffix(SHARD).removesuffix(REPLICA)
    if whole != axis:
        n = _shards_along(layout, whole, shards)
        return n if axis.endswith(SHARD) else size_along(layout, whole) // n
    sizes = {"data": layout.dp * layout.cp, "stage": layout.size // layout.pp, "ends": min(2, layout.pp)}
    found: int = sizes[axis] if axis in sizes else getattr(layout, axis)
    return found


def along(layout: Layout, axis: str, shards: Shards | None = None) -> tuple[Ranks, ...]:
    """The groups of a layout along the axis of a Group, those of one rank among them.

    shards: of the module's weights, as in data_axes(). Data ranks next to each other share one copy.
    """
    whole = axis.removesuffix(SHARD).removesuffix(REPLICA)
    if whole != axis:
        n, lines = _shards_along(layout, whole, shards), along(layout, whole)
        if axis.endswith(SHARD):
            return tuple(line[k : k + n] for line in lines for k in range(0, len(line), n))
        return tuple(line[k::n] for line in lines for k in range(n))
    if axis == "stage":
        return tuple(layout.stage_ranks(pp) for pp in range(layout.pp))
    if axis == "ends":
        return tuple((line[0], line[-1]) for line in layout.groups("pp")) if layout.pp > 1 else ()
    return layout.groups(("cp", "dp") if axis == "data" else axis)


def edge_ranks(source: Layout, dest: Layout, stage: int) -> Ranks:
    """All ranks at either end of an edge: the source's last stage, and the sink's `stage`; ascending."""
    return tuple(sorted({*source.stage_ranks(source.pp - 1), *dest.stage_ranks(stage % dest.pp)}))
