"""A new modality by a class outside the packages, in a heterogeneous layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mm.harness import largest_difference, small, train_few
from tests.mm.shards import sensor_samples, write_shard

ROOT = Path(__file__).resolve().parents[3]


def test_a_sensor_encoder_trains_in_any_layout(tmp_path: Path, ranks: Any) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    raw = small(data={"train": [str(tmp_path / "sensor-*.tar")]})
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}}
    raw["model"] = {"sensor": sensor, "llm": raw["model"]["llm"]}
    expected = ranks(1, train_few, raw, 2)[0]
    assert expected[0]["grad_norm_by_module"]["sensor"] > 0
    for layout in ({"sensor": {"tp": 2}, "llm": {"tp": 4}}, {"llm": {"tp": 2, "ep": 4}}):
        for result in ranks(4, train_few, {**raw, "layout": layout}, 2):
            assert largest_difference(result, expected) < 1e-9


@pytest.mark.slow
def test_a_touch_encoder_is_cut_every_way(tmp_path: Path, ranks: Any) -> None:
    write_shard(tmp_path / "touch-000000.tar", sensor_samples(20, module="touch", shape=(4, 4)))
    raw = small(data={"train": [str(tmp_path / "touch-*.tar")]})
    touch = {"encoder": "examples.touch_encoder:TouchEncoder", "projector": {"hidden": 24}}
    raw["model"] = {"touch": touch, "llm": raw["model"]["llm"]}
    expected = ranks(1, train_few, raw, 2)[0]
    assert expected[0]["grad_norm_by_module"]["touch"] > 0
    for layout in (
        {"touch": {"ranks": "0-1", "cp": 2}, "llm": {"tp": 2, "ep": 4, "sequence_parallel": True}},
        {"touch": {"cp": 2, "pp": 2}, "llm": {"cp": 2}},
        {"touch": {"ranks": "0-1", "tp": 2, "sequence_parallel": True}, "llm": {"ranks": "2-3", "pp": 2}},
    ):
        case = {**raw, "layout": layout, "schedule": {"microbatches": 2}}
        for result in ranks(4, train_few, case, 2):
            assert largest_difference(result, expected) < 1e-9


def test_the_example_is_short() -> None:
    assert len((ROOT / "examples" / "sensor_encoder.py").read_text().splitlines()) < 65
