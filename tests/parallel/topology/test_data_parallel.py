"""Data-parallel policies: their names, and how they split weights over nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.topology.data_parallel import POLICIES, Shards, check_policy, shards_of, shards_within
from parallel.topology.layout import Unfit, make_layout


def test_names() -> None:
    for policy in POLICIES:
        assert check_policy(make_layout("m", 4, {"data_parallel": policy})) == policy
    assert check_policy(make_layout("m", 4, {})) is check_policy(
        make_layout("m", 4, {"data_parallel": "auto"})
    )
    for wrong, near in (
        ("zero", "zero"),
        ("replicated", "replicate"),
        ("fsdp", "hsdp"),
        (3, "known: replicate"),
    ):
        with pytest.raises(ValueError, match=f"layout.m.data_parallel is '{wrong}'; .*{near}"):
            check_policy(make_layout("m", 4, {"data_parallel": wrong}))


def test_shards() -> None:
    layout = make_layout("m", 16, {"tp": 2, "ep": 4})
    assert shards_of(layout, "replicate", None) == Shards(1, 1)
    for policy in ("zero1", "zero2", "zero3", "step"):
        assert shards_of(layout, policy, None) == Shards(8, 4)
    assert shards_of(layout, "hsdp", 8) == Shards(4, 2)
    assert shards_of(layout, "hsdp", 4) == Shards(2, 1)  # experts are spread over every node
    for node_size, why in ((None, "one node"), (2, "no two of them"), (16, "all of them")):
        with pytest.raises(Unfit, match=why):
            shards_of(layout, "hsdp", node_size)
    assert shards_of(make_layout("m", 16, {"cp": 2, "pp": 2}), "hsdp", 4).dense == 4


@given(st.permutations(range(24)), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), st.sampled_from([2, 3, 4, 8]))
def test_shards_within_nodes(ranks: list[int], size: int, node_size: int) -> None:
    """Runs of the found size are inside nodes, and of no larger divisor."""
    groups = [ranks[k : k + size] for k in range(0, 24, size)]
    found = shards_within(groups, node_size)

    def fits(n: int) -> bool:
        runs = [g[k : k + n] for g in groups for k in range(0, size, n)]
        return all(len({r // node_size for r in run}) == 1 for run in runs)

    assert size % found == 0 and fits(found)
    assert not any(fits(n) for n in range(found + 1, size + 1) if size % n == 0)
