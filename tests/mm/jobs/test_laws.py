"""The first law: for every layout, losses and per-module gradient norms are those of one process."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest

from parallel.boundary import BoundaryCommunicator
from parallel.boundary.plan import Transfer
from parallel.sequence.intervals import count
from tests.mm.harness import SMALL, largest_difference, small, train_few
from tests.slow import on_demand

MODULES = ("vision", "audio", "llm")
NAMED = {
    "all dp4": (4, {}),
    "llm tp4": (4, {"llm": {"tp": 4}}),
    "vision tp2, llm tp2 ep2": (4, {"vision": {"tp": 2}, "llm": {"tp": 2, "ep": 2}}),
    "audio tp4, llm dp4 ep4": (4, {"audio": {"tp": 4}, "llm": {"ep": 4}}),
    "llm tp2": (4, {"llm": {"tp": 2}}),
    "llm tp2 sp": (4, {"llm": {"tp": 2, "sequence_parallel": True}}),
    "llm tp4 sp ep4": (4, {"llm": {"tp": 4, "sequence_parallel": True, "ep": 4}}),
    "dp3": (3, {}),
    "vision tp3, llm dp3": (3, {"vision": {"tp": 3}}),
    "a subset of the ranks": (4, {m: {"ranks": [1, 3]} for m in ("vision", "audio", "llm")}),
    "disjoint": (4, {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": "2-3", "tp": 2}}),
    "disjoint, dp 3 to 2": (
        5,
        {"vision": {"ranks": "0-2"}, "audio": {"ranks": "0-2"}, "llm": {"ranks": "3-4"}},
    ),
    "disjoint, dp 3 to 1": (4, {"vision": {"ranks": "0-2"}, "audio": {"ranks": "0-2"}, "llm": {"ranks": 3}}),
    "mixed": (4, {"audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3"}}),
    "encoders cp": (4, {"vision": {"cp": 2}, "audio": {"cp": 4}}),
    "encoders sp": (4, {m: {"tp": 2, "sequence_parallel": True} for m in ("vision", "audio")}),
    "encoders cp tp pp": (4, {"vision": {"cp": 2, "tp": 2}, "audio": {"pp": 2, "cp": 2}}),
    "llm pp": (4, {"llm": {"pp": 2, "tp": 2}}),
    "llm cp": (4, {"llm": {"cp": 2}}),
    "llm cp tp sp": (4, {"llm": {"cp": 2, "tp": 2, "sequence_parallel": True}}),
    "llm cp4 ep4": (4, {"vision": {"ranks": 0}, "llm": {"cp": 4, "ep": 4}}),
    "llm ep2 etp2": (4, {"llm": {"ep": 2, "etp": 2}}),
    "llm etp4 tp2 sp": (4, {"llm": {"tp": 2, "sequence_parallel": True, "etp": 4}}),
    "llm cp pp": (4, {"llm": {"cp": 2, "pp": 2}}),
    "tp2 sp on [1, 0]": (2, {m: {"ranks": [1, 0], "tp": 2, "sequence_parallel": True} for m in MODULES}),
    "cp2 on [1, 0]": (2, {m: {"ranks": [1, 0], "cp": 2} for m in MODULES}),
    "llm tp4 on [3, 1, 2, 0], audio on [2, 0], vision strided": (
        4,
        {
            "vision": {"ranks": [0, 2, 1, 3], "tp": 2, "sequence_parallel": True},
            "audio": {"ranks": [2, 0], "tp": 2},
            "llm": {"ranks": [3, 1, 2, 0], "tp": 4},
        },
    ),
    "tp2 dp2 on [2, 1, 3, 0]": (4, {m: {"ranks": [2, 1, 3, 0], "tp": 2} for m in MODULES}),
    "experts on [2, 0, 3, 1]": (
        4,
        {"llm": {"ranks": [2, 0, 3, 1], "tp": 2, "sequence_parallel": True, "ep": 2, "etp": 2}},
    ),
    "dp4 in orders of their own": (
        4,
        {"vision": {"ranks": [2, 0, 3, 1]}, "audio": {"ranks": [3, 2, 1, 0]}, "llm": {"ranks": [1, 3, 0, 2]}},
    ),
}

SCHEDULES: dict[str, tuple[dict[str, dict[str, object]], dict[str, object]]] = {
    "colocated, llm pp2 tp2": ({"llm": {"pp": 2, "tp": 2}}, {"microbatches": 3}),
    "disjoint, llm pp2": (
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 4},
    ),
    "mixed, llm pp2": (
        {"vision": {"ranks": "2-3"}, "audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 4},
    ),
    "encoder pipelines": ({"vision": {"pp": 2}, "audio": {"pp": 2, "tp": 2}}, {"microbatches": 2}),
    "encoders in bubbles": (
        {"vision": {"ranks": "0-1", "pp": 2}, "audio": {"ranks": 3}, "llm": {"ranks": [2, 0, 1], "pp": 3}},
        {"microbatches": 4, "kind": "fill"},
    ),
    "encoders in bubbles, pp4": (
        {"vision": {"tp": 1}, "llm": {"pp": 4}},
        {"microbatches": 6, "kind": "fill", "ahead": 6},
    ),
    "encoders by twos and threes": (
        {"audio": {"ranks": "0-1"}, "llm": {"pp": 2}},
        {"microbatches": 5, "encoder_batch": {"vision": 2, "audio": 3}},
    ),
    "encoders by twos, their rows split": (
        {
            "vision": {"tp": 2, "cp": 2, "sequence_parallel": True},
            "audio": {"cp": 2, "pp": 2},
            "llm": {"pp": 2, "tp": 2},
        },
        {"microbatches": 5, "encoder_batch": {"vision": 2, "audio": 2}},
    ),
    "encoders by twos and threes, disjoint pipelines": (
        {
            "vision": {"ranks": [1, 0], "pp": 2},
            "audio": {"ranks": "0-1", "tp": 2, "sequence_parallel": True},
            "llm": {"ranks": "2-3", "pp": 2},
        },
        {"microbatches": 5, "encoder_batch": {"vision": 2, "audio": 3}},
    ),
    "gpipe": ({"llm": {"pp": 4}}, {"microbatches": 3, "kind": "gpipe"}),
    "three phases": ({"llm": {"pp": 2, "vpp": 2}}, {"microbatches": 3, "kind": "three_phase"}),
    "virtual stages": ({"llm": {"pp": 2, "vpp": 2}}, {"microbatches": 3}),
    "zero bubble": ({"llm": {"pp": 2, "tp": 2}}, {"microbatches": 3, "kind": "zero_bubble"}),
    "zero bubble, disjoint": (
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 4, "kind": "zero_bubble"},
    ),
    "virtual stages, disjoint": (
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2, "vpp": 2}},
        {"microbatches": 5},
    ),
    "zero bubble, ranks from last to first": (
        {
            "vision": {"ranks": [2, 3, 0, 1], "pp": 2, "cp": 2},
            "llm": {"ranks": [3, 2, 1, 0], "pp": 2, "vpp": 2, "tp": 2, "sequence_parallel": True},
        },
        {"microbatches": 2, "kind": "zero_bubble"},
    ),
    "gpipe, mixed": (
        {"audio": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 3, "kind": "gpipe"},
    ),
    "three phases, tp": ({"llm": {"pp": 2, "tp": 2}}, {"microbatches": 4, "kind": "three_phase"}),
    "sequential, disjoint": (
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "2-3"}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 3, "kind": "sequential"},
    ),
    "sequential": ({"llm": {"pp": 2}}, {"microbatches": 3, "kind": "sequential"}),
}


@pytest.fixture(scope="module")
def reference(pool: Any) -> list[dict[str, Any]]:
    return pool.run(1, train_few, small(), 2)[0]


# Of each kind one in make test, those with most in them; the others on demand.
OFTEN = (
    *("audio tp4, llm dp4 ep4", "disjoint", "disjoint, dp 3 to 1", "mixed", "encoders cp tp pp"),
    *("llm cp tp sp", "llm etp4 tp2 sp", "experts on [2, 0, 3, 1]", "tp2 sp on [1, 0]"),
    *("llm tp4 on [3, 1, 2, 0], audio on [2, 0], vision strided", "dp4 in orders of their own"),
)
OFTEN_SCHEDULES = (
    *("mixed, llm pp2", "encoders in bubbles", "encoders by twos, their rows split", "virtual stages"),
    *("three phases", "zero bubble, ranks from last to first", "gpipe, mixed"),
)


@pytest.mark.parametrize("name", on_demand(NAMED, NAMED.keys() - {*OFTEN}))
def test_layouts_learn_what_one_process_learns(
    name: str, ranks: Any, reference: list[dict[str, Any]]
) -> None:
    world, layout = NAMED[name]
    results = ranks(world, train_few, small(layout=layout), 2)
    for result in results:
        assert largest_difference(result, reference) < 1e-9


def test_on_several_machines_layouts_learn_what_one_process_learns(
    ranks: Any, reference: list[dict[str, Any]]
) -> None:
    layout = {"vision": {"ranks": "0-1", "tp": 2}, "audio": {"tp": 2}, "llm": {"ranks": [3, 2], "tp": 2}}
    raw = small(layout=layout, schedule={"microbatches": 2}, run={**SMALL["run"], "node_size": 2})
    found = ranks(4, train_and_relay, raw)
    for metrics, _, _ in found:
        assert largest_difference(metrics, reference) < 1e-9
    # Both ranks of a node read all rows, and gradients: what comes from afar enters at one and goes on.
    forward, backward = (sum(rows[i] for rows in found) for i in (1, 2))
    assert forward > 0 and backward > 0


def train_and_relay(raw: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
    """Metrics of two steps, and how many rows this rank sent on in second hops: forward and backward."""
    relayed = [0, 0]
    depart = BoundaryCommunicator._depart

    def count_relayed(self: Any, name: str, t: Transfer, *given: Any) -> Any:
        rows = sum(count(message.rows) for message in t.relay.sends) if t.relay else 0
        relayed["backward" in name] += rows
        return depart(self, name, t, *given)

    with mock.patch.object(BoundaryCommunicator, "_depart", count_relayed):
        return train_few(raw, 2), *relayed


@pytest.mark.parametrize("name", on_demand(SCHEDULES, SCHEDULES.keys() - {*OFTEN_SCHEDULES}))
def test_schedules_learn_what_one_process_learns(
    name: str, ranks: Any, reference: list[dict[str, Any]]
) -> None:
    layout, schedule = SCHEDULES[name]
    results = ranks(4, train_few, small(layout=layout, schedule=schedule), 2)
    for result in results:
        assert largest_difference(result, reference) < 1e-9


def random_degrees(rng: random.Random, ranks: list[int], *, pp: list[int], encoder: bool) -> dict[str, Any]:
    """Degrees that fit `ranks`; what a module must divide (heads, experts, layers) divides by all of them."""
    n = len(ranks)
    spec: dict[str, Any] = {"ranks": ranks, "pp": rng.choice([d for d in pp if n % d == 0])}
    left = n // spec["pp"]
    spec["tp"] = rng.choice([d for d in (1, 2, 3, 4) if left % d == 0 and (encoder or d != 3)])
    spec["cp"] = rng.choice([d for d in (1, 2, 3, 4) if left // spec["tp"] % d == 0])
    spec["sequence_parallel"] = rng.random() < 0.5
    if not encoder:
        spec["ep"] = rng.choice([d for d in (1, 2, 4) if left % d == 0])
        spec["etp"] = rng.choice([d for d in (1, 2, 4) if left // spec["ep"] % d == 0])
    return spec


def random_job(seed: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(ranks, a config in any layout and placement, the same for one process)."""
    rng = random.Random(seed)
    world = rng.choice([2, 3, 4, 4])
    layout = {}
    for m in ("vision", "audio", "llm"):
        some = rng.sample(range(world), rng.randint(1, world))  # in any order
        ranks = rng.choice([list(range(world)), sorted(some), some, rng.sample(range(world), world)])
        layout[m] = random_degrees(rng, ranks, pp=[1, 1, 2], encoder=m != "llm")
    microbatches = rng.choice([1, 2, 3])
    train = {
        "global_batch": rng.choice([1, 5, 7]),
        "recompute": rng.random() < 0.5,
        "shard": rng.choice(["module", "layer"]),
        "steps": 2,
    }
    kind = rng.choice(["auto", "auto", "sequential", "gpipe", "three_phase", "zero_bubble"])
    raw = small(train=train, layout=layout, schedule={"microbatches": microbatches, "kind": kind})
    for m in ("vision", "audio"):
        raw["model"][m]["deal"] = rng.choice(["sample", "cost"])
    return world, raw, small(train={"global_batch": train["global_batch"], "steps": 2})


@pytest.mark.parametrize("seed", on_demand(range(6), [4, 5]))
def test_random_layouts_placements_batches_and_schedules(seed: int, ranks: Any) -> None:
    world, raw, alone = random_job(seed)
    expected = ranks(1, train_few, alone, 2)
    got = ranks(world, train_few, raw, 2)
    assert largest_difference(got[0], expected[0]) < 1e-9, (world, raw["layout"], raw["schedule"])
