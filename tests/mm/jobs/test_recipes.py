"""Optimizers and learning rates by module and layer: what a job does with them, in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.train.one_step import train_step
from tests.mm.harness import CONFIGS, largest_difference, running, small, train_few, weigh
from tests.slow import on_demand

MUON = {"optimizer": "muon", "lr": 0.01, "warmup": 0.0}
STORED = {"moments": "bfloat16", "lr": 0.01, "warmup": 0.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed": {
        "vision": {"cp": 2, "data_parallel": "replicate"},
        "audio": {"ranks": "0-1"},
        "llm": {"ranks": [2, 1, 3, 0], "tp": 2, "ep": 2, "etp": 2},
    },
    "data parallel": {"vision": {"tp": 2}, "llm": {"data_parallel": "zero1"}},
    "piped": {"llm": {"pp": 2, "cp": 2, "ep": 2}, "vision": {"ranks": [0, 2, 3, 1], "pp": 2, "tp": 2}},
}


@pytest.mark.parametrize("layout", on_demand(LAYOUTS, ["data parallel", "piped"]))
def test_muon_learns_what_one_process_learns(layout: str, ranks: Any) -> None:
    expected = ranks(1, train_few, small(train=MUON), 3)[0]
    got = ranks(4, train_few, small(train=MUON, layout=LAYOUTS[layout], schedule={"microbatches": 2}), 3)
    assert largest_difference(got[0], expected) < 1e-9
    adam = ranks(1, train_few, small(train={"lr": 0.01, "warmup": 0.0}), 3)[0]
    assert abs(adam[-1]["loss"] - expected[-1]["loss"]) > 1e-4, "it is another optimizer"


def moved(raw: dict[str, Any]) -> dict[str, float]:
    """By parameter, the most that an element moves in the first step."""
    with running(raw) as (job, feed):
        before = weigh(job)
        train_step(job, feed, 0)
        return {k: float(np.abs(value - before[k][1]).max()) for k, (_, value) in weigh(job).items()}


def test_each_parameter_moves_at_its_rate(ranks: Any) -> None:
    """AdamW's first step moves an element by its rate, whatever its gradient is, but for eps."""
    train = {
        "lr": 1e-3,
        "eps": 1e-30,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "lr_by": {"vision": 4e-3, "vision.projector": 8e-3, "audio.encoder": 2e-3},
        "layer_decay": {"vision": 0.5, "llm": 0.5},
    }
    found = ranks(1, moved, small(train=train))[0]
    layers = {"vision": 2, "llm": len(small()["model"]["llm"]["pattern"])}
    rates = {
        "vision.encoder.patch.weight": 4e-3 * 0.5 ** (layers["vision"] + 1),
        "vision.encoder.row_position": 4e-3 * 0.5 ** (layers["vision"] + 1),
        "vision.encoder.blocks.0.q": 4e-3 * 0.5 ** layers["vision"],
        "vision.encoder.blocks.1.q": 4e-3 * 0.5 ** (layers["vision"] - 1),
        "vision.encoder.norm.weight": 4e-3,
        "vision.projector.up.weight": 8e-3,
        "audio.encoder.blocks.0.q": 2e-3,
        "audio.projector.up.weight": 1e-3,
        "llm.embed.weight": 1e-3 * 0.5 ** (layers["llm"] + 1),
        "llm.layers.0.norm.weight": 1e-3 * 0.5 ** layers["llm"],
        "llm.norm.weight": 1e-3,
        "llm.head": 1e-3,
    }
    for name, rate in rates.items():
        assert found[name] == pytest.approx(rate, rel=1e-4), name


def test_stored_moments_learn_the_same_in_any_layout(ranks: Any) -> None:
    expected = ranks(1, train_few, small(train=STORED), 3)[0]
    layout = LAYOUTS["mixed"]
    got = ranks(4, train_few, small(train=STORED, layout=layout, schedule={"microbatches": 2}), 3)
    # An element whose rounding falls to the other side moves by 1/256 of its step.
    assert largest_difference(got[0], expected) < 1e-4
    exact = ranks(1, train_few, small(train={"lr": 0.01, "warmup": 0.0}), 3)[0]
    assert 0 < largest_difference(expected, exact) < 0.02


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"lr_by": {"visoin": 1e-3}}, r"train\.lr_by\.visoin; did you mean"),
        ({"lr_by": {"llm.encoder": 1e-3}}, r"train\.lr_by\.llm\.encoder"),
        ({"layer_decay": {"vision.encoder": 0.9}}, r"train\.layer_decay\.vision\.encoder"),
        ({"moments": "bfloat16", "betas": [0.9, 0.999]}, "at most 0.99"),
        ({"momentum": 0.9}, "nearest: train.optimizer=muon"),
    ],
)
def test_recipes_without_a_meaning_are_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        from_mapping(small(train=train), CONFIGS)
