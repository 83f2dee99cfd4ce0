"""Every option of the language model in the whole job: sharded weights, stages, updates of biases."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mm.config.outline import SINK
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.ranks.job import build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.one_step import open_feed, train_step
from tests.mm.harness import CONFIGS, SMALL, largest_difference, small
from tests.slow import on_demand

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


def learn(raw: dict[str, Any], steps: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Metrics of the first steps, and after them the selection biases of this rank's layers by name."""
    world = dist.get_world_size()
    blueprint = draw_up(from_mapping(raw, CONFIGS), world)
    index = open_index(blueprint, blueprint.cfg.data.train, CONFIGS)
    job = build_job(blueprint, RankInfo(dist.get_rank(), world, torch.device("cpu")))
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        metrics = [asdict(train_step(job, feed, step)) for step in range(steps)]
        buffers = [b for part in job.parts[SINK].values() for b in part.named_buffers()]
        return metrics, {name: b.clone() for name, b in buffers if name.endswith("expert_bias")}
    finally:
        feed.close()
        data.assembler.reader.close()
        job.close()


Learned = tuple[list[dict[str, Any]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def reference(pool: Any) -> Learned:
    out: Learned = pool.run(1, learn, job({}, {}), 3)[0]
    return out


@pytest.mark.parametrize("name", on_demand(LAYOUTS, ["cp2 ep2", "tp2 sp ep4", "pp2 tp2"]))
def test_layouts_learn_what_one_process_learns(name: str, ranks: Any, reference: Learned) -> None:
    llm, schedule = LAYOUTS[name]
    shard = {"shard": "layer"} if name == "tp2 sp ep4" else {}
    results = ranks(4, learn, job(llm, schedule, **shard), 3)
    metrics, biases = reference
    assert {key for one in metrics for key in one["objectives"]} == {"balance", "z", "mtp"}
    seen = {}
    for own, held in results:
        assert largest_difference(own, metrics) < 1e-9
        for step, expected in zip(own, metrics, strict=True):
            assert step["objectives"] == pytest.approx(expected["objectives"], rel=1e-9)
        seen |= held
        assert not [key for key, bias in held.items() if not torch.equal(bias, biases[key])]
    assert seen.keys() == biases.keys() and all(bias.any() for bias in biases.values())
