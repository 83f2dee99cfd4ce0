"""Process groups of one module: the dense and the expert view of the same ranks, for each pipeline rank.

The dense view is pp x dp x cp x tp, the expert view pp x edp x ep x etp (parallel folding, arXiv 2504.14960).
Expert parallelism may cross tensor, context and data parallelism because only the ranks have to agree, not
the axes. Only pp is common to both views, so each pipeline rank has meshes of its own.

A group's ranks are in the order of the layout, whatever their numbers: an index in a group is a coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.topology.axis import Axes, Axis
from parallel.topology.data_parallel import Shards
from parallel.topology.directions import Directions
from parallel.topology.groups import BETWEEN, COMPUTE, DIRECTIONS, Group, data_axes, group_plan
from parallel.topology.layout import Layout, View
from parallel.topology.process_groups import Groups, make_groups

REPLICA = "replica"  # the dim of ranks that hold the same shards
Dim = tuple[str, Group]  # of a mesh: its name, and its group


@dataclass(frozen=True)
class ModuleMesh:
    """The meshes of a module as one of its ranks sees them.

    layout: the layout that the meshes were made of.
    dense: DeviceMesh (replica, data, tp) of this pipeline rank. Over data a copy of the weights is sharded,
        and replica has the copies; together they are dp x cp, the ranks that see different tokens. It lacks
        replica and tp where they are one rank.
    expert: DeviceMesh (replica, edp, ep, etp) of this pipeline rank, without all but edp where they are one
        rank. None where the plan of the groups has no experts in this module.
    axes: what layers compute over.
    groups: all groups of the job that this rank is in.
    stage: all ranks of this pipeline rank; None where that is one.
    pipeline: the ranks that differ along pp alone. Activations and gradients have a group each, since each
        has an order of its own; None without pp.
    ends: this rank and the one at the other end of its pipeline, where first and last stage share weights.
    """

    layout: Layout
    dense: DeviceMesh
    expert: DeviceMesh | None
    axes: Axes
    groups: Groups
    stage: dist.ProcessGroup | None = None
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
            self._over[key] = self._whole(view)[axes]
        return self._over[key]

    def _whole(self, view: View) -> DeviceMesh:
        whole = self.dense if view == "dense" else self.expert
        assert whole is not None, f"{self.layout.module} has an expert, but its groups were made for none"
        return whole

    @property
    def data(self) -> DeviceMesh:
        """The mesh over which FSDP shards the dense weights: dp x cp, or the part of it with one replica."""
        return self.over("dense", "data")

    def replicas(self, view: View) -> int:
        """How many data ranks hold the same shard of a weight."""
        mesh = self._whole(view)
        names = mesh.mesh_dim_names or ()
        return mesh.size(names.index(REPLICA)) if REPLICA in names else 1

    def data_parallel(self, view: View) -> DeviceMesh:
        """The mesh that FSDP takes: (data) or (replica, data), with edp for data in the expert view."""
        data, names = "data" if view == "dense" else "edp", self._whole(view).mesh_dim_names or ()
        return self.over(view, *(n for n in (REPLICA, data) if n in names))

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
        """Destroy all of `groups`, those of other modules too; every rank calls this."""
        self.groups.close()


def build_mesh(
    layout: Layout,
    device_type: str,
    *,
    timeout_s: float = 120.0,
    tie_ends: bool = False,
    groups: Groups | None = None,
    shards: Shards | None = None,
) -> ModuleMesh | None:
    """The meshes of `layout` on this rank; None on ranks that the module does not live on.

    groups: of the job, whose plan has the module. Without it they are made for this module alone: every rank
    of the default process group then calls this, in the same order of modules. timeout_s: of the groups that
    are made, in seconds. tie_ends: whether to make the groups of first and last pipeline ranks. shards: into
    how many shards weights are split (data_parallel.shards_of), the same as in that plan; None: as many as
    there are data ranks.
    """
    rank = dist.get_rank()
    if groups is None:
        tied = (layout.module,) if tie_ends else ()
        split = {} if shards is None else {layout.module: shards}
        plan = group_plan({layout.module: layout}, world=dist.get_world_size(), tied=tied, shards=split)
        groups = make_groups(plan, timeout_s=timeout_s)
    if rank not in layout.ranks:
        return None
    at, inside = layout.coord(rank), layout.expert_coord(rank)
    ranks = torch.tensor(layout.stage_ranks(at.pp))
    sizes = {"tp": layout.tp, "cp": layout.cp, "ep": layout.ep, "etp": layout.etp}
    places = {"tp": at.tp, "cp": at.cp, "ep": inside.ep, "etp": inside.etp}
    name = {axis: Group("module", layout.module, axis) for axis in (*COMPUTE, *BETWEEN)}
    axes = {axis: _axis(axis, n, places[axis], groups.find(name[axis])) for axis, n in sizes.items()}
    n = shards or Shards(layout.dp * layout.cp, layout.edp)
    dense = _mesh(
        device_type,
        ranks.view(-1, n.dense, layout.tp),
        (*_data_dims(layout, "data", "data", n), ("tp", name["tp"])),
        groups,
    )
    # Without a model-parallel axis the data ranks of experts are those of the dense weights.
    of_experts = "edp" if max(layout.tp, layout.ep, layout.etp) > 1 else "data"
    expert = _mesh(
        device_type,
        ranks.view(-1, n.expert, layout.ep, layout.etp),
        (*_data_dims(layout, "edp", of_experts, n), ("ep", name["ep"]), ("etp", name["etp"])),
        groups,
    )
    assert dense is not None, f"the groups were made without {layout.module}, or for other shards"
    return ModuleMesh(
        layout=layout,
        dense=dense,
        expert=expert,
        axes=Axes(**axes, sequence_parallel=layout.sequence_parallel and layout.tp > 1),
        groups=groups,
        stage=groups.find(name["stage"]),
        pipeline=_pipeline(layout, groups),
        ends=groups.find(name["ends"]),
    )


def _pipeline(layout: Layout, groups: Groups) -> Directions[dist.ProcessGroup] | None:
    if layout.pp == 1:
        return None
    return Directions(*(groups[Group("module", layout.module, "pp", way)] for way in DIRECTIONS))


def _data_dims(layout: Layout, dim: str, axis: str, shards: Shards) -> tuple[Dim, Dim]:
    """The dims of replicas and of shards. dim: name of the latter. axis: of the data ranks of the view."""
    shard, replica = data_axes(layout, axis, shards)
    return (REPLICA, Group("module", layout.module, replica)), (dim, Group("module", layout.module, shard))


def _mesh(device_type: str, ranks: torch.Tensor, dims: Sequence[Dim], groups: Groups) -> DeviceMesh | None:
    """The mesh over `ranks` [replica, shard, ..]; None where a group is not in the plan.

    Dims of one rank have no group, and are left out. That of shards is there always: FSDP needs a mesh, and
    sends nothing over one rank.
    """
    kept = [k for k, n in enumerate(ranks.shape) if k == 1 or n > 1]
    found = [groups.find(dims[k][1]) if ranks.shape[k] > 1 else groups.alone() for k in kept]
    members = [group for group in found if group is not None]
    if len(members) < len(found):
        return None
    shape, names = [ranks.shape[k] for k in kept], tuple(dims[k][0] for k in kept)
    return DeviceMesh.from_group(members, device_type, ranks.reshape(shape), mesh_dim_names=names)


def _axis(name: str, size: int, coordinate: int, group: dist.ProcessGroup | None) -> Axis:
    if size == 1:
        return Axis.single(name)
    # Plans are made by the layout's coordinates, collectives put shards in the order of the group's ranks.
    assert group is not None and group.rank() == coordinate, (name, group, coordinate)
    return Axis(name, size, coordinate, group)
