"""Groups of a module's meshes: who is in them, and how long they wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.topology.layout import make_layout
from parallel.topology.mesh import build_mesh
from parallel.topology.process_groups import ordered


def groups(spec: dict[str, Any]) -> tuple[dict[str, tuple[list[int], int]], set[timedelta]]:
    """Global ranks of each of this rank's groups with its index among them, and how long they wait."""
    mesh = build_mesh(make_layout("net", dist.get_world_size(), spec), "cpu", timeout_s=77, tie_ends=True)
    assert mesh is not None
    found = {}
    for view in (mesh.dense, mesh.expert):
        assert view is not None
        coordinate = dict(zip(view.mesh_dim_names or (), view.get_coordinate() or (), strict=True))
        for name, at in coordinate.items():
            found[name] = view.get_group(name)
            assert found[name].rank() == view.get_local_rank(name) == at, name  # FSDP and DTensor agree
    if mesh.stage is not None:
        found |= {"stage": mesh.stage}
    for axis in (mesh.axes.tp, mesh.axes.cp, mesh.axes.ep, mesh.axes.etp):
        if axis.group is not None:
            assert axis.group.rank() == axis.rank
            found |= {axis.name: axis.group}
    if mesh.pipeline is not None:
        found |= {"onward": mesh.pipeline.forward, "back": mesh.pipeline.backward}
    if mesh.ends is not None:
        found |= {"ends": mesh.ends}
    made = [g for g in found.values() if g is not dist.group.WORLD]
    waits = {g._get_backend(torch.device("cpu")).options._timeout for g in made if g.size() > 1}
    ranks = {name: (dist.get_process_group_ranks(g), g.rank()) for name, g in found.items()}
    dist.barrier()  # a group must not end while another member is still making it
    mesh.close()
    return ranks, waits


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"tp": 2},
        {"tp": 2, "cp": 2},
        {"pp": 2, "tp": 2},
        {"tp": 2, "ep": 4},
        {"pp": 2, "ep": 2},
        {"pp": 4},
        {"ranks": [2, 0, 3, 1]},
        {"ranks": [3, 1, 2, 0], "tp": 2, "ep": 2, "etp": 2},
        {"ranks": [2, 1, 3, 0], "tp": 2, "cp": 2, "etp": 4},
        {"ranks": [3, 2, 1, 0], "pp": 2, "cp": 2, "ep": 2},
        {"ranks": [1, 3, 0, 2], "pp": 4},
    ],
    ids=str,
)
def test_groups_are_the_layouts_and_wait_no_longer_than_told(spec: dict[str, Any], ranks: Any) -> None:
    layout = make_layout("net", 4, spec)
    along = {"tp": "tp", "cp": "cp", "ep": "ep", "etp": "etp", "edp": "edp", "onward": "pp", "back": "pp"}
    for rank, (found, waits) in enumerate(ranks(4, groups, spec)):
        assert waits <= {timedelta(seconds=77)}
        at, inside = layout.coord(rank), layout.expert_coord(rank)
        expected = {name: list(layout.peers(rank, axis)) for name, axis in along.items()}
        expected["stage"] = list(layout.stage_ranks(at.pp))
        expected["data"] = list(layout.peers(rank, ("cp", "dp")))
        expected["ends"] = [layout.peers(rank, "pp")[k] for k in (0, -1)]
        for name, (members, place) in found.items():
            assert members == expected[name], (name, rank)
            assert members[place] == rank
        for name, place in (("tp", at.tp), ("ep", inside.ep), ("etp", inside.etp), ("edp", inside.edp)):
            assert name not in found or found[name][1] == place, name
        assert found["data"][1] == at.dp * layout.cp + at.cp
        assert ("stage" in found) == (layout.pp < 4)
        assert {"data", "edp"} <= found.keys()  # FSDP needs a mesh, of one rank too
        for name, n in (("tp", layout.tp), ("cp", layout.cp), ("ep", layout.ep), ("etp", layout.etp)):
            assert (name in found) == (n > 1), name
        assert ("onward" in found) == ("back" in found) == (layout.pp > 1)
        assert ("ends" in found) == (layout.pp > 1 and at.pp in (0, layout.pp - 1))


def sorted_by_torch(order: list[int]) -> list[int]:
    """Members of a group made as under a torch that sorts ranks."""
    group = dist.new_group(ordered(order))
    return dist.get_process_group_ranks(group)


def test_an_order_outlives_the_sorting_of_older_versions_of_torch(ranks: Any) -> None:
    order = [2, 0, 3, 1]
    assert sorted(ordered(order)) == order and ordered(order) == order
    assert ranks(4, sorted_by_torch, order) == [order] * 4
