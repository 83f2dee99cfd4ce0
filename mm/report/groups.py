"""The process groups of a job as data and for people: how many a rank has, and which cross nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm.plan.blueprint import Blueprint


@dataclass(frozen=True)
class GroupData:
    """Groups of one name: how many there are, ranks of the largest, and how many have ranks of several
    nodes."""

    groups: int
    ranks: int
    across_nodes: int


@dataclass(frozen=True)
class CommunicatorData:
    """The groups of a job.

    node_size: ranks a node; null where one node has all, or where it is not known. calls: with which a rank
    makes its groups, at most. a_rank: by kind, the communicators of the rank that has the most. names: by
    name.
    """

    node_size: int | None
    calls: int
    a_rank: Mapping[str, int]
    names: Mapping[str, GroupData]


def communicator_data(blueprint: Blueprint) -> CommunicatorData:
    """The groups of a job, placed on nodes by run.node_size or by what torchrun started here."""
    plan, size = blueprint.groups, blueprint.node_size
    crossing = plan.crossing(size) if size else {}
    return CommunicatorData(
        node_size=size,
        calls=len(plan.families),
        a_rank=plan.most_by_kind(),
        names={
            str(name): GroupData(len(groups), max(map(len, groups)), crossing.get(name, 0))
            for name, groups in plan.named.items()
        },
    )


def communicator_lines(data: CommunicatorData) -> list[str]:
    """Two lines: communicators of a rank, and groups that cross nodes."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in data.a_rank.items() if kind != "all")
    lines = [
        f"groups: at most {data.a_rank.get('all', 0)} communicators a rank ({kinds or 'none'}), "
        f"made in at most {data.calls} calls"
    ]
    if data.node_size is None:
        return [*lines, "nodes: one, or not known (run.node_size)"]
    across = [f"{name} ({g.across_nodes} of {g.groups})" for name, g in data.names.items() if g.across_nodes]
    return [*lines, f"nodes of {data.node_size} ranks, crossed by {', '.join(across) or 'no group'}"]
