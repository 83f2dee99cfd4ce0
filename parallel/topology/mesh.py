"""Process groups of one module: the dense and the expert view of the same ranks, for each pipeline rank.

The dense view is pp x dp x cp x tp, the expert view pp x edp x ep x etp (parallel folding, arXiv 2504.14960).
Expert parallelism may cross tensor, context and data parallelism because only the ranks have to agree, not
the axes. Only pp is common to both views, so each pipeline rank has meshes of its own.

A group's ranks are in the order of the layout, whatever their numbers: an index in a group is a coordinate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.topology.axis import Axes, Axis
from parallel.topology.data_parallel import Shards
from parallel.topology.directions import Directions
from parallel.topology.layout import Layout, View

REPLICA = "replica"  # the axis of ranks that hold the same shards


@dataclass(frozen=True)
class ModuleMesh:
    """The meshes of a module as one of its ranks sees them.

    layout: the layout that the meshes were made of.
    dense: DeviceMesh (data, tp) of this pipeline rank. data is dp x cp: the ranks that see different tokens,
        over which weights are sharded. Where it has more ranks than shards, (replica, data, tp).
    expert: DeviceMesh (edp, ep, etp) of this pipeline rank, or (replica, edp, ep, etp).
    axes: what layers compute over.
    stage: all ranks of this pipeline rank.
    pipeline: the ranks that differ along pp alone. Activations and gradients have a group each, since each
        has an order of its own; None without pp.
    ends: this rank and the one at the other end of its pipeline, where first and last stage share weights.
    """

    layout: Layout
    dense: DeviceMesh
    expert: DeviceMesh
    axes: Axes
    stage: dist.ProcessGroup
    pipeline: Directions[dist.ProcessGroup] | None = None
    ends: dist.ProcessGroup | None = None
    _over: dict[tuple[View, tuple[str, ...]], DeviceMesh] = field(
        default_factory=dict, compare=False, repr=False
    )

    def over(self, view: View, *axes: str) -> DeviceMesh:
        """The mesh of some axes of a view.

        Each is made once: slicing a DeviceMesh takes milliseconds, and a module has thousands of parameters.
        """
        key = view, axes
        if key not in self._over:
            self._over[key] = (self.dense if view == "dense" else self.expert)[axes]
        return self._over[key]

    @property
    def data(self) -> DeviceMesh:
        """The mesh over which FSDP shards the dense weights: dp x cp, or the part of it with one replica."""
        return self.over("dense", "data")

    def replicas(self, view: View) -> int:
        """How many data ranks hold the same shard of a weight."""
        mesh = self.dense if view == "dense" else self.expert
        names = mesh.mesh_dim_names or ()
        return mesh.size(names.index(REPLICA)) if REPLICA in names else 1

    def data_parallel(self, view: View) -> DeviceMesh:
        """The mesh that FSDP takes: (data) or (replica, data), with edp for data in the expert view."""
        data = "data" if view == "dense" else "edp"
        mesh = self.dense if view == "dense" else self.expert
        return self.over(view, *(n for n in (REPLICA, data) if n in (mesh.mesh_dim_names or ())))

    @property
    def data_groups(self) -> list[dist.ProcessGroup]:
        """Groups such that sums over one after the other are sums over dp x cp."""
        mesh = self.data_parallel("dense")
        return [mesh.get_group(k) for k in range(mesh.ndim) if mesh.size(k) > 1]

    @property
    def folded(self) -> bool:
        """Whether experts are sharded or replicated differently from the dense weights."""
        return any(axis.size > 1 for axis in (self.axes.tp, self.axes.ep, self.axes.etp))

    def close(self) -> None:
        """Destroy the module's process groups; every rank of the module calls this."""
        meshes = [
            mesh.get_group(axis) for mesh in (self.dense, self.expert) for axis in mesh.mesh_dim_names or ()
        ]
        others = [self.stage, *(self.pipeline or ()), self.ends, self.axes.cp.group]
        for group in {id(g): g for g in [*meshes, *others] if g is not None}.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def build_mesh(
    layout: Layout,
    device_type: str,
    *,
    timeout_s: float = 120.0,
    tie_ends: bool = False,
    shards: Shards | None = None,
) -> ModuleMesh | None:
    """Make the groups of `layout`; every rank of the job calls this, in the same order of modules.

    timeout_s: timeout of all groups, in seconds. tie_ends: whether to make the groups of first and last
    pipeline ranks. shards: into how many shards weights are split (data_parallel.shards_of); None: as many as
    there are data ranks. Returns None on ranks that the module does not live on. Needs an initialised default
    process group.
    """
    n = shards or Shards(layout.dp * layout.cp, layout.edp)
    rank, limit = dist.get_rank(), timedelta(seconds=timeout_s)
    dense, expert, stages = [], [], []
    for pp in range(layout.pp):
        ranks = torch.tensor(layout.stage_ranks(pp))
        by_tp, by_expert = ranks.view(-1, layout.tp), ranks.view(-1, layout.ep, layout.etp)
        dense.append(_mesh(device_type, *_replicated(by_tp, ("data", "tp"), n.dense), limit))
        expert.append(_mesh(device_type, *_replicated(by_expert, ("edp", "ep", "etp"), n.expert), limit))
        stages.append(ordered_group(ranks.tolist(), limit))
    cp = _own_group(layout.groups("cp"), limit) if layout.cp > 1 else None
    lines = layout.groups("pp") if layout.pp > 1 else ()
    pipes = [_own_group(lines, limit) for _ in range(2)] if lines else []
    ends = _own_group([(line[0], line[-1]) for line in lines], limit) if tie_ends and lines else None
    if rank not in layout.ranks:
        return None
    at, inside = layout.coord(rank), layout.expert_coord(rank)
    own_dense, own_expert = dense[at.pp], expert[at.pp]
    assert own_dense is not None and own_expert is not None
    axes = Axes(
        tp=_axis(own_dense, "tp", at.tp),
        ep=_axis(own_expert, "ep", inside.ep),
        etp=_axis(own_expert, "etp", inside.etp),
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        cp=Axis("cp", layout.cp, at.cp, cp) if cp is not None else Axis.single("cp"),
    )
    pipeline = None
    if pipes:
        assert pipes[0] is not None and pipes[1] is not None
        pipeline = Directions(forward=pipes[0], backward=pipes[1])
    return ModuleMesh(
        layout=layout,
        dense=own_dense,
        expert=own_expert,
        axes=axes,
        stage=stages[at.pp],
        pipeline=pipeline,
        ends=ends,
    )


def _replicated(
    ranks: torch.Tensor, axes: tuple[str, ...], shards: int
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """`ranks` and the names of its dims; with a dim for replicas, where dim 0 has more ranks than shards."""
    if ranks.shape[0] == shards:
        return ranks, axes
    return ranks.view(-1, shards, *ranks.shape[1:]), (REPLICA, *axes)


def _mesh(
    device_type: str, ranks: torch.Tensor, axes: tuple[str, ...], timeout: timedelta
) -> DeviceMesh | None:
    """The mesh over `ranks`, an axis a dim; None on other ranks.

    Its groups are made here, since those that DeviceMesh makes have the backend's default timeout, which is
    half an hour for some.
    """
    groups = []
    for dim in range(ranks.ndim):
        lines = ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim]).tolist()
        groups.append(_own_group(lines, timeout))
    made = [g for g in groups if g is not None]
    return DeviceMesh.from_group(made, device_type, ranks, mesh_dim_names=axes) if made else None


def _own_group(groups: Iterable[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make all of `groups`, as every rank must, and return this rank's."""
    rank = dist.get_rank()
    made = [(ranks, ordered_group(ranks, timeout)) for ranks in groups]
    return next((group for ranks, group in made if rank in ranks), None)


def ordered_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """new_group() in which ranks[k] is rank k, so that a rank's index in the group is its coordinate on the
    axis. Every rank of the job calls this; those that are not in `ranks` get what new_group() returns there.
    """
    new_group: Callable[..., dist.ProcessGroup] = dist.new_group  # which torch leaves untyped
    if "sort_ranks" in inspect.signature(new_group).parameters:
        return new_group(list(ranks), timeout=timeout, sort_ranks=False)
    return new_group(ordered(ranks), timeout=timeout)


def ordered(ranks: Sequence[int]) -> list[int]:
    """`ranks` as numbers that sorting leaves in this order: torch before 2.12 sorts those of a new group."""
    return [_Ordered(rank, k) for k, rank in enumerate(ranks)]


class _Ordered(int):
    """A rank that is compared by its index among others."""

    index: int

    def __new__(cls, rank: int, index: int) -> _Ordered:
        out = super().__new__(cls, rank)
        out.index = index
        return out

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __lt__(self, other: int) -> bool:
        return self.index < other.index if isinstance(other, _Ordered) else int(self) < other


def _axis(mesh: DeviceMesh, name: str, coordinate: int) -> Axis:
    sub = mesh[name]
    if sub.size() == 1:
        return Axis.single(name)
    # Plans are made by the layout's coordinates, collectives put shards in the order of the group's ranks.
    assert sub.get_group().rank() == coordinate, (name, sub.mesh.tolist(), coordinate)
    return Axis(name, sub.size(), coordinate, sub.get_group())
