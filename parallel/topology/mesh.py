"""Process groups of one module: the dense and the expert view of the same ranks, pipeline ranks apart.

The dense view is pp x dp x cp x tp, the expert view pp x edp x ep x etp (parallel folding, arXiv 2504.14960):
expert parallelism may cross tensor, context and data parallelism because only the ranks have to agree, not
the axes. Only pp is common to both, so each pipeline rank has meshes of its own.

A group's ranks are in the order of the layout, whatever their numbers: a place in a group is a coordinate.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.topology.axis import Axes, Axis
from parallel.topology.directions import Directions
from parallel.topology.layout import Layout, View


@dataclass(frozen=True)
class ModuleMesh:
    """The meshes of a module as one of its ranks sees them.

    dense: DeviceMesh (data, tp) of this pipeline rank, data being dp x cp, over which weights are replicas
    that see different tokens; expert: DeviceMesh (edp, ep, etp); axes: what layers compute over; stage: all
    ranks of this pipeline rank. pipeline: the ranks that differ along pp alone, in two groups, for
    activations and for gradients, which are ordered each for itself; None without pp. ends: this rank and
    the one at the other end of its pipeline, where first and last stage share weights.
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
        """The mesh of some axes of a view. Each is made once: slicing a DeviceMesh takes milliseconds, and a
        module has thousands of parameters."""
        key = view, axes
        if key not in self._over:
            self._over[key] = (self.dense if view == "dense" else self.expert)[axes]
        return self._over[key]

    @property
    def data(self) -> DeviceMesh:
        """What FSDP shards the dense weights over: dp x cp."""
        return self.over("dense", "data")

    @property
    def folded(self) -> bool:
        """Whether experts are cut or replicated differently from the dense weights."""
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
    layout: Layout, device_type: str, *, timeout_s: float = 120.0, tie_ends: bool = False
) -> ModuleMesh | None:
    """Make the groups of `layout`; every rank of the job calls this, in the same order of modules.

    timeout_s bounds the waits of all of them. tie_ends: make the groups of first and last pipeline ranks.
    Returns None on ranks that the module does not live on. Needs an initialised default process group.
    """
    rank, limit = dist.get_rank(), timedelta(seconds=timeout_s)
    dense, expert, stages = [], [], []
    for pp in range(layout.pp):
        ranks = torch.tensor(layout.stage_ranks(pp))
        dense.append(_mesh(device_type, ranks.view(-1, layout.tp), ("data", "tp"), limit))
        expert.append(_mesh(device_type, ranks.view(-1, layout.ep, layout.etp), ("edp", "ep", "etp"), limit))
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


def _mesh(
    device_type: str, ranks: torch.Tensor, axes: tuple[str, ...], timeout: timedelta
) -> DeviceMesh | None:
    """The mesh over `ranks`, an axis a dim; None on other ranks. Its groups are made here because those that
    DeviceMesh makes wait as long as the backend likes: half an hour for some."""
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
    """new_group() in which ranks[k] is rank k, so that a rank's place in the group is its coordinate on the
    axis; every rank of the job calls this. On ranks that are not in it, what new_group() returns there."""
    if "sort_ranks" in inspect.signature(dist.new_group).parameters:
        return dist.new_group(list(ranks), timeout=timeout, sort_ranks=False)
    return dist.new_group(in_place(ranks), timeout=timeout)


def in_place(ranks: Sequence[int]) -> list[int]:
    """`ranks` as numbers that sorting leaves in this order: torch before 2.12 sorts those of a new group."""
    return [_Placed(rank, k) for k, rank in enumerate(ranks)]


class _Placed(int):
    """A rank that is compared by its place among others."""

    place: int

    def __new__(cls, rank: int, place: int) -> _Placed:
        out = super().__new__(cls, rank)
        out.place = place
        return out

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __lt__(self, other: int) -> bool:
        return self.place < other.place if isinstance(other, _Placed) else int(self) < other


def _axis(mesh: DeviceMesh, name: str, coordinate: int) -> Axis:
    sub = mesh[name]
    if sub.size() == 1:
        return Axis.single(name)
    # Plans are made by the layout's coordinates, collectives put shards in the order of the group's ranks.
    assert sub.get_group().rank() == coordinate, (name, sub.mesh.tolist(), coordinate)
    return Axis(name, sub.size(), coordinate, sub.get_group())
