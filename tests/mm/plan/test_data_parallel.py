"""What policies cost, without a rank: the default by size, and laws that hold for every layout."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.data_parallel import PolicyCost, policy_costs
from parallel.topology.data_parallel import Policy
from tests.mm.harness import CONFIGS, small


def blueprint(world: int, **sections: Any) -> Blueprint:
    return draw_up(from_mapping(small(**sections), CONFIGS), world)


def test_the_default_follows_from_size_and_micro_batches() -> None:
    assert set(blueprint(4).policies.values()) == {"zero3"}
    small_ones = blueprint(1024, schedule={"microbatches": 64}, train={"global_batch": 1024})
    assert set(small_ones.policies.values()) == {"step"}
    wide = {"width": 12288, "heads": 12, "layers": 4, "mlp": 49152, "max_grid": 8}  # 7 billion
    raw = small(schedule={"microbatches": 2})
    raw["model"]["vision"]["options"] = wide
    large = draw_up(from_mapping(raw, CONFIGS), 4)
    assert large.policies == {"vision": "zero3", "audio": "step", "llm": "step"}
    filled = blueprint(4, layout={"llm": {"pp": 2}}, schedule={"microbatches": 2, "kind": "fill"})
    assert filled.policies["vision"] == "step" and filled.uses["vision"].params == "step"


def test_a_policy_means_nothing_where_each_weight_is_on_one_rank() -> None:
    layout = {m: {"ranks": 0, "data_parallel": "zero1"} for m in ("vision", "audio", "llm")}
    alone = blueprint(1, layout=layout)
    assert {use.params for use in alone.uses.values()} == {"each"}
    tp = blueprint(2, layout={"llm": {"tp": 2, "data_parallel": "zero1"}})
    assert tp.uses["llm"].params == "replicated"  # its experts are on both ranks


@pytest.mark.parametrize(
    ("run", "layout", "schedule", "why"),
    [
        ({}, {"vision": {"data_parallel": "zero4"}}, {}, "data_parallel is 'zero4'; did you mean zero3"),
        ({}, {"llm": {"data_parallel": "hsdp"}}, {}, "one node; nearest: layout.llm.data_parallel=zero3"),
        ({"node_size": 2}, {"llm": {"tp": 2, "data_parallel": "hsdp"}}, {}, "no two of them"),
        ({"node_size": 2}, {"audio": {"ranks": "0-1", "data_parallel": "hsdp"}}, {}, "all of them share"),
        (
            {},
            {"llm": {"pp": 2}, "vision": {"data_parallel": "zero3"}},
            {"kind": "fill", "microbatches": 2},
            "gathers weights in each forward and backward and sums gradients in each backward",
        ),
        (
            {},
            {"llm": {"pp": 2}, "audio": {"data_parallel": "zero2"}},
            {"kind": "fill", "microbatches": 2},
            "zero2 sums gradients in each backward.*nearest: layout.audio.data_parallel=step",
        ),
    ],
)
def test_misuse_is_refused(run: Any, layout: Any, schedule: Any, why: str) -> None:
    with pytest.raises(Refused, match=why):
        blueprint(4, run=run, layout=layout, schedule=schedule)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([{}, {"pp": 2}, {"tp": 2}, {"ep": 4}, {"cp": 2, "ep": 2}, {"pp": 2, "vpp": 2}]),
    st.sampled_from([2, 4]),
    st.sampled_from(["module", "layer"]),
)
def test_laws_of_costs(layout: dict[str, int], microbatches: int, shard: str) -> None:
    run = blueprint(
        8,
        run={"node_size": 4},
        layout={"llm": layout},
        schedule={"microbatches": microbatches},
        train={"shard": shard},
    )
    for m in run.modules:
        cost: dict[Policy, PolicyCost] = policy_costs(run, m)
        assert run.policies[m] in cost
        for c in cost.values():
            assert c.rest <= c.step <= c.peak
        rest = {p: c.rest for p, c in cost.items()}
        assert rest["step"] == rest["zero3"] < rest["zero1"] == rest["zero2"] < rest["replicate"]
        assert cost["zero1"].step == cost["step"].step and cost["zero1"].moved == cost["step"].moved
        assert cost["zero2"].step < cost["zero1"].step
        assert cost["zero2"].moved.gathers == cost["zero1"].moved.gathers
        assert cost["zero2"].moved.scatters == microbatches * cost["zero1"].moved.scatters
        assert cost["replicate"].moved.sums and not cost["replicate"].moved.gathers
        if "hsdp" in cost:
            assert rest["zero3"] < rest["hsdp"] < rest["replicate"]
            assert 0 < cost["hsdp"].moved.sum_bytes < cost["replicate"].moved.sum_bytes
