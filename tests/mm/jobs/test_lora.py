"""Low-rank adapters in a job: the same in any layout, from and into checkpoints, merged by an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.hf import load_hf
from mm.checkpoint import saver
from mm.checkpoint.folders import export_hf
from mm.checkpoint.weights import check_weights, start_from
from mm.config.schema import from_mapping
from mm.config.stages import stages_of
from mm.errors import CheckpointError, Refused
from mm.plan.blueprint import draw_up
from mm.train.one_step import train_step
from parallel.sharding.low_rank import is_adapter
from tests.mm.checkpoint.runs import contents
from tests.mm.harness import CONFIGS, largest_difference, running, small, train_few, weigh
from tests.slow import on_demand

LORA = {
    "llm": {"rank": 3, "alpha": 6.0, "targets": ["all-linear"]},
    "vision": {"rank": 2, "targets": ["q", "v", "up"]},
    "audio": {"rank": 1, "targets": ["value", "gate"]},
}
TRAIN = {"lora": LORA, "lr": 0.02, "warmup": 0.0}
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp sp ep, cp": ({"vision": SP, "audio": {"cp": 2}, "llm": {**SP, "ranks": [2, 1, 3, 0], "ep": 2}}, {}),
    "tp4": ({"vision": {"tp": 2, "cp": 2}, "llm": {"tp": 4}}, {"microbatches": 2}),
    "zero bubble": ({"llm": {"pp": 2, "tp": 2}}, {"microbatches": 3, "kind": "zero_bubble"}),
    "pp, zero3": (
        {"vision": {"pp": 2}, "llm": {"pp": 2, "vpp": 2, "data_parallel": "zero3"}},
        {"microbatches": 4},
    ),
    "disjoint": ({"vision": {"ranks": "0-1"}, "audio": {"ranks": 0}, "llm": {"ranks": "2-3", "cp": 2}}, {}),
}


@pytest.fixture(scope="module")
def alone(pool: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pool.run(1, train_few, small(train=TRAIN), 3)[0]
    return found


@pytest.mark.parametrize("name", on_demand(LAYOUTS, LAYOUTS.keys() - {"tp sp ep, cp"}))
def test_layouts_learn_what_one_process_learns(name: str, ranks: Any, alone: list[dict[str, Any]]) -> None:
    layout, schedule = LAYOUTS[name]
    for found in ranks(4, train_few, small(train=TRAIN, layout=layout, schedule=schedule), 3):
        assert largest_difference(found, alone) < 1e-9


LATENTS = {
    **{"pattern": "*-*", "kv_rank": 5, "q_rank": 6, "head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7},
    **{"n_kv_heads": 4, "rope_theta": 1e4},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{**SP, "ranks": [1, 0]}, {"tp": 2}, {"cp": 2}, {"pp": 2}])
def test_latent_attention_learns_what_one_process_learns(ranks: Any, layout: dict[str, Any]) -> None:
    raw = small(train=TRAIN)
    raw["model"]["llm"] |= LATENTS
    (alone,), spread = ranks(1, train_few, raw, 3), ranks(2, train_few, {**raw, "layout": {"llm": layout}}, 3)
    assert all(largest_difference(found, alone) < 1e-9 for found in spread)


def trained(raw: dict[str, Any], folder: str, start: str | None) -> list[str]:
    """Two steps and a checkpoint; the parameters that have moved here."""
    with running(raw) as (job, feed):
        if start is not None:
            start_from(job, [Path(start)])
        before = weigh(job)
        for step in range(2):
            train_step(job, feed, step)
        saver.save(job, feed.index, Path(folder), 2, feed.bad)
        return [name for name, (_, value) in weigh(job).items() if not np.array_equal(value, before[name][1])]


def test_from_a_checkpoint_into_one_and_merged(ranks: Any, tmp_path: Path) -> None:
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    ranks(1, trained, small(train={"lr": 0.02}), base, None)
    start = str(tmp_path / "base" / "step-00000002")
    moved = ranks(2, trained, small(train=TRAIN, layout={"llm": {"tp": 2}}), run, start)[0]
    of_llm = [name for name in moved if name.startswith("llm.") and not name.endswith("expert_bias")]
    assert of_llm and all(is_adapter(name) for name in of_llm)
    assert any(name.startswith("vision.projector.") for name in moved), "an encoder's projector is trained"
    assert all(is_adapter(name) for name in moved if name.startswith("vision.encoder."))
    saved = tmp_path / "run" / "step-00000002"
    tensors, before = contents(saved), contents(Path(start))
    moments = [name.rpartition(".")[0] for name in tensors if name.startswith("llm.adam.")]
    assert moments and all(is_adapter(name) for name in moments), "no state for what is frozen"
    export_hf(saved, tmp_path / "out", None)
    for name, value in load_hf(tmp_path / "out", dtype=torch.float64).model.state_dict().items():
        weight = tensors[f"llm.{name}"]
        if not name.endswith("expert_bias"):
            assert torch.equal(weight, before[f"llm.{name}"]), "the base is frozen"
        a = tensors.get(f"llm.{name}_lora_a")
        if a is not None:
            weight = weight + 2.0 * tensors[f"llm.{name}_lora_b"] @ a
        torch.testing.assert_close(value, weight.to(value.dtype), rtol=1e-12, atol=1e-14)
    without = draw_up(from_mapping(small(), CONFIGS), 1)
    with pytest.raises(CheckpointError, match="it has adapters that this model lacks"):
        check_weights(without, saved)
    check_weights(draw_up(from_mapping(small(train=TRAIN), CONFIGS), 1), Path(start))


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(Refused, match=r"'experts', which is no linear map .* end with .*in_b.*, q, up, v"):
        draw_up(from_mapping(small(train={"lora": {"llm": {"targets": ["experts"]}}}), CONFIGS), 1)
    with pytest.raises(Refused, match=r"train\.lora\.lm.*did you mean"):
        from_mapping(small(train={"lora": {"lm": {}}}), CONFIGS)
    raw = small()
    del raw["train"]["steps"]
    stages = [{"name": "one", "steps": 1, "lora": LORA}, {"name": "two", "steps": 1}]
    with pytest.raises(Refused, match=r"stage one has train\.lora\.llm"):
        stages_of(from_mapping({**raw, "stages": stages}, CONFIGS))
