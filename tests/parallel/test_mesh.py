"""Groups of a module's meshes: who is in them, and how long they wait."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.layout import make_layout
from parallel.mesh import build_mesh


def groups(spec: dict[str, Any]) -> tuple[dict[str, list[int]], set[timedelta]]:
    """Global ranks of each of this rank's groups, and how long they wait."""
    mesh = build_mesh(make_layout("net", dist.get_world_size(), spec), "cpu", timeout_s=77, tie_ends=True)
    assert mesh is not None
    found = {name: mesh.dense.get_group(name) for name in ("data", "tp")}
    found |= {name: mesh.expert.get_group(name) for name in ("edp", "ep", "etp")}
    found |= {"stage": mesh.stage}
    found |= {n: a.group for n, a in (("cp", mesh.axes.cp),) if a.group is not None}
    if mesh.pipeline is not None:
        found |= {"onward": mesh.pipeline[0], "back": mesh.pipeline[1]}
    if mesh.ends is not None:
        found |= {"ends": mesh.ends}
    waits = {g._get_backend(torch.device("cpu")).options._timeout for g in found.values()}
    ranks = {name: dist.get_process_group_ranks(g) for name, g in found.items()}
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
    ],
    ids=str,
)
def test_groups_are_the_layouts_and_wait_no_longer_than_told(spec: dict[str, Any], ranks: Any) -> None:
    layout = make_layout("net", 4, spec)
    for rank, (found, waits) in enumerate(ranks(4, groups, spec)):
        assert waits == {timedelta(seconds=77)}
        at = layout.coord(rank)
        for name in ("tp", "ep", "etp"):
            assert found[name] == sorted(next(g for g in layout.groups(name) if rank in g)), name
        assert found["stage"] == sorted(layout.stage_ranks(at.pp))
        assert len(found["data"]) == layout.dp * layout.cp and rank in found["data"]
        assert len(found["edp"]) * layout.ep * layout.etp == len(found["stage"])
        assert ("cp" in found) == (layout.cp > 1)
        assert ("onward" in found) == ("back" in found) == (layout.pp > 1)
        assert ("ends" in found) == (layout.pp > 1 and at.pp in (0, layout.pp - 1))
