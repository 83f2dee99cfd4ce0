"""Data-parallel policies: what the data ranks of a module hold, and when they gather and sum. Pure, no torch.

The data ranks of a weight are those that hold the same model-parallel part of it: dp x cp, and edp for
experts. ZeRO's stages are those of arXiv 1910.02054; HSDP is arXiv 2304.11277, section 3.2.2.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from parallel.topology.layout import Layout, Unfit

Policy = Literal["replicate", "zero1", "zero2", "zero3", "hsdp", "step"]
Params = Literal["each", "step", "replicated"]
Sums = Literal["backward", "step"]


@dataclass(frozen=True)
class Holding:
    """What a policy means.

    params: when weights are whole. "each": around each forward and backward. "step": from a step's first
        computation to its last. "replicated": always; where they are sharded too, they are gathered after
        the update.
    sums: when gradients are summed over the data ranks: in each "backward", or once a "step", until which
        they are whole on every rank.
    sharded: whether weights, as the optimizer updates them, its state, and summed gradients are sharded.
    """

    params: Params
    sums: Sums
    sharded: bool = True


POLICIES: dict[Policy, Holding] = {
    "replicate": Holding("replicated", "step", sharded=False),
    "zero1": Holding("replicated", "step"),
    "zero2": Holding("replicated", "backward"),
    "zero3": Holding("each", "backward"),
    "hsdp": Holding("each", "backward"),
    "step": Holding("step", "step"),
}
AUTO = "auto"


class Shards(NamedTuple):
    """Into how many shards the weights of each view are split; the other data ranks are replicas of these."""

    dense: int
    expert: int


def check_policy(layout: Layout) -> Policy | None:
    """The policy that a layout asks for; None for auto, which leaves it to the sizes of the modules.

    Raises ValueError for an unknown one.
    """
    given = layout.data_parallel
    if given == AUTO:
        return None
    for policy in POLICIES:
        if policy == given:
            return policy
    near = difflib.get_close_matches(given, [*get_args(Policy), AUTO], 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(POLICIES)}, {AUTO}"
    raise ValueError(f"layout.{layout.module}.data_parallel is {given!r}; {hint}")


def shards_of(layout: Layout, policy: Policy, node_size: int | None) -> Shards:
    """How a policy splits a module's weights over its data ranks.

    node_size: ranks a node, None where one node has all of them. Raises Unfit where hsdp cannot be told from
    another policy.
    """
    dense, expert = layout.dp * layout.cp, layout.edp
    if not POLICIES[policy].sharded:
        return Shards(1, 1)
    if policy != "hsdp":
        return Shards(dense, expert)
    key = f"layout.{layout.module}.data_parallel"
    if node_size is None:
        raise Unfit(
            f"{key}=hsdp shards weights inside a node and replicates them over nodes, but all ranks are on "
            "one node",
            [{key: "zero3"}, {key: "step"}],
        )
    within = Shards(
        shards_within(layout.groups(("cp", "dp")), node_size), shards_within(layout.groups("edp"), node_size)
    )
    if within.dense in (1, dense) and dense > 1:
        why = "no two of them next to each other share" if within.dense == 1 else "all of them share"
        raise Unfit(
            f"{key}=hsdp: of the {dense} data ranks that hold the same weights, {why} a node of {node_size} "
            "ranks; needed: several on each of several nodes",
            [{key: "replicate" if within.dense == 1 else "zero3"}, {key: "step"}],
        )
    return within


def shards_within(groups: Sequence[Sequence[int]], node_size: int) -> int:
    """The largest divisor of the groups' size whose runs of so many ranks are each inside one node."""
    n = len(groups[0])
    for size in (k for k in range(min(n, node_size), 1, -1) if n % k == 0):
        runs = (group[k : k + size] for group in groups for k in range(0, n, size))
        if all(len({r // node_size for r in run}) == 1 for run in runs):
            return size
    return 1
