"""What is not counted as it runs is said in words, and only that."""

from __future__ import annotations

from typing import Any

import pytest

from mm.config.schema import from_mapping
from mm.plan.blueprint import Blueprint, draw_up
from mm.predict.count.left_out import left_out
from tests.mm.harness import CONFIGS, small


def drawn_up(llm: dict[str, Any], train: dict[str, Any], layout: dict[str, Any]) -> Blueprint:
    raw = small(train=train, layout={"llm": layout} if layout else {})
    raw["model"]["llm"] |= llm
    return draw_up(from_mapping(raw, CONFIGS), 4)


def test_a_job_that_is_counted_as_it_runs_has_no_words() -> None:
    assert left_out(drawn_up({}, {}, {})) == []
    counted = {"window": 8, "dispatcher": "all_gather", "mtp_layers": 2, "mtp_pattern": "*E"}
    assert left_out(drawn_up(counted, {"lora": {"llm": {}}}, {"ep": 2})) == []


@pytest.mark.parametrize(
    ("llm", "train", "layout", "words"),
    [
        ({"attention_cap": 30.0}, {}, {}, "bounds of attention's scores"),
        ({"attention_sinks": True}, {}, {}, "sinks"),
        ({}, {"offload": 1024}, {}, "train.offload"),
        ({}, {"shard": "layer"}, {}, "train.shard=layer"),
        ({}, {"lora": {"llm": {"targets": ["0.mixer.*"]}}}, {}, "targets of train.lora.llm"),
    ],
)
def test_what_is_left_out_is_said(
    llm: dict[str, Any], train: dict[str, Any], layout: dict[str, Any], words: str
) -> None:
    found = left_out(drawn_up(llm, train, layout))
    assert len(found) == 1 and words in found[-1], found
