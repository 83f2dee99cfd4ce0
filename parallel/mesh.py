"""Process groups of one module: the dense and the expert view of the same ranks, pipeline ranks apart.

The dense view is pp x dp x cp x tp, the expert view pp x edp x ep x etp (parallel folding, arXiv 2504.14960):
expert parallelism may cross tensor, context and data parallelism because only the ranks have to agree, not
the axes. Only pp is common to both, so each pipeline rank has meshes of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.axis import Axes, Axis
from parallel.layout import Layout


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
    pipeline: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    ends: dist.ProcessGroup | None = None

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


def build_mesh(layout: Layout, device_type: str, *, tie_ends: bool = False) -> ModuleMesh | None:
    """Make the groups of `layout`; every rank of the job calls this, in the same order of modules.

    tie_ends: make the groups of first and last pipeline ranks. Returns None on ranks that the module does
    not live on. Needs an initialised default process group.
    """
    rank = dist.get_rank()
    dense, expert, stages = [], [], []
    for pp in range(layout.pp):
        ranks = torch.tensor(layout.stage_ranks(pp))
        dense.append(DeviceMesh(device_type, ranks.view(-1, layout.tp), mesh_dim_names=("data", "tp")))
        folded = ranks.view(-1, layout.ep, layout.etp)
        expert.append(DeviceMesh(device_type, folded, mesh_dim_names=("edp", "ep", "etp")))
        stages.append(dist.new_group(sorted(ranks.tolist())))
    cp = _own_group(layout.groups("cp"), rank) if layout.cp > 1 else None
    lines = layout.groups("pp") if layout.pp > 1 else ()
    pipes = [_own_group(lines, rank) for _ in range(2)] if lines else []
    ends = _own_group([(line[0], line[-1]) for line in lines], rank) if tie_ends and lines else None
    if rank not in layout.ranks:
        return None
    at = layout.coord(rank)
    axes = Axes(
        tp=_axis(dense[at.pp], "tp"),
        ep=_axis(expert[at.pp], "ep"),
        etp=_axis(expert[at.pp], "etp"),
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        cp=Axis("cp", layout.cp, at.cp, cp) if cp is not None else Axis.single("cp"),
    )
    pipeline = None
    if pipes:
        assert pipes[0] is not None and pipes[1] is not None
        pipeline = pipes[0], pipes[1]
    return ModuleMesh(layout, dense[at.pp], expert[at.pp], axes, stages[at.pp], pipeline, ends)


def _own_group(groups: Iterable[tuple[int, ...]], rank: int) -> dist.ProcessGroup | None:
    """Make all of `groups`, as every rank must, and return the one of `rank`."""
    made = [(ranks, dist.new_group(sorted(ranks))) for ranks in groups]
    return next((group for ranks, group in made if rank in ranks), None)


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    sub = mesh[name]
    if sub.size() == 1:
        return Axis.single(name)
    return Axis(name, sub.size(), sub.get_local_rank(), sub.get_group())
