"""Every option of the language model in the whole job: sharded weights, stages, updates of biases."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mm.harness import SMALL, largest_difference, small, train_few

OPTIONS: dict[str, Any] = {
    "pattern": "E-M*E",
    "latent": 8,
    "expert_groups": 4,
    "top_groups": 3,
    "mlp_gated": True,
    "mlp_bias": True,
    "activation": "silu",
    "attention_bias": True,
    "rope_theta": 100.0,
    "aux_weight": 0.3,
    "z_weight": 0.2,
    "mtp_layers": 2,
    "tied": True,
    "expert_bias_rate": 0.1,  # steps large enough to change who is chosen
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2 sp ep4": ({"tp": 2, "sequence_parallel": True, "ep": 4}, {}),
    "pp2 tp2": ({"pp": 2, "tp": 2}, {"microbatches": 2}),
    "cp2 ep2": ({"cp": 2, "ep": 2}, {}),
    "pp2 cp2, zero bubble": ({"pp": 2, "cp": 2}, {"microbatches": 3, "kind": "zero_bubble"}),
}


def job(llm: dict[str, Any], schedule: dict[str, Any], **train: Any) -> dict[str, Any]:
    return small(
        model={"llm": {**SMALL["model"]["llm"], **OPTIONS}},
        layout={"llm": llm},
        schedule=schedule,
        train={**SMALL["train"], **train},
    )


@pytest.fixture(scope="module")
def reference(pool: Any) -> list[dict[str, Any]]:
    return pool.run(1, train_few, job({}, {}), 3)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_learn_what_one_process_learns(
    name: str, ranks: Any, reference: list[dict[str, Any]]
) -> None:
    llm, schedule = LAYOUTS[name]
    shard = {"shard": "layer"} if name == "tp2 sp ep4" else {}
    results = ranks(4, train_few, job(llm, schedule, **shard), 3)
    assert largest_difference(results[0], reference) < 1e-9
