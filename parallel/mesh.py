"""Process groups of one module: the dense and the expert view of the same ranks.

The dense view is dp x tp, the expert view edp x ep (parallel folding, arXiv 2504.14960): expert parallelism
may cross tensor and data parallelism because only the ranks have to agree, not the axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parallel.axis import Axes, Axis
from parallel.layout import Layout, View


@dataclass(frozen=True)
class ModuleMesh:
    """The meshes of a module as one of its ranks sees them.

    dense: DeviceMesh (dp, tp); expert: DeviceMesh (edp, ep); axes: what layers compute over; group: all
    ranks of the module.
    """

    layout: Layout
    dense: DeviceMesh
    expert: DeviceMesh
    axes: Axes
    group: dist.ProcessGroup

    @property
    def folded(self) -> bool:
        """Whether experts are cut or replicated differently from the dense weights."""
        return self.axes.tp.size > 1 or self.axes.ep.size > 1

    def close(self) -> None:
        """Destroy the module's process groups; every rank of the module calls this."""
        groups = [
            mesh.get_group(axis) for mesh in (self.dense, self.expert) for axis in mesh.mesh_dim_names or ()
        ]
        for group in {id(g): g for g in [*groups, self.group]}.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def build_mesh(layout: Layout, device_type: str) -> ModuleMesh | None:
    """Make the groups of `layout`; every rank of the job calls this, in the same order of modules.

    Returns None on ranks that the module does not live on. Needs an initialised default process group.
    """
    dense = _device_mesh(layout, "dense", ("dp", "tp"), device_type)
    expert = _device_mesh(layout, "expert", ("edp", "ep"), device_type)
    group = dist.new_group(sorted(layout.ranks))
    if dist.get_rank() not in layout.ranks:
        return None
    axes = Axes(_axis(dense, "tp"), _axis(expert, "ep"), layout.sequence_parallel and layout.tp > 1)
    return ModuleMesh(layout, dense, expert, axes, group)


def _device_mesh(layout: Layout, view: View, names: tuple[str, str], device_type: str) -> DeviceMesh:
    ranks = torch.tensor(layout.grid(view))  # [pp, dp, cp, tp] or [pp, edp, ep, etp]
    assert layout.pp == layout.cp == layout.etp == 1, "axes that are refused before a mesh is built"
    outer, inner = (ranks.shape[1], ranks.shape[3]) if view == "dense" else (ranks.shape[1], ranks.shape[2])
    return DeviceMesh(device_type, ranks.reshape(outer, inner), mesh_dim_names=names)


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    sub = mesh[name]
    if sub.size() == 1:
        return Axis.single(name)
    return Axis(name, sub.size(), sub.get_local_rank(), sub.get_group())
