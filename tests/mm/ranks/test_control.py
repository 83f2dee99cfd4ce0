"""Ranks that plan another step, and ranks that are gone, are named."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.errors import PolyrankError
from mm.plan.blueprint import draw_up
from mm.plan.step_plan import plan_step
from mm.ranks.control import Control, notice, whole_job
from tests.mm.harness import CONFIGS, small


def disagree(case: str) -> str:
    blueprint = draw_up(from_mapping(small(), CONFIGS), 3)
    samples = list(load_index(["data/digits-train-*.tar"], CONFIGS).samples[:6])
    if case == "sample" and dist.get_rank() == 2:
        samples[4] = load_index(["data/digits-train-*.tar"], CONFIGS).samples[9]
    plan = plan_step(7, samples, blueprint.inputs)
    try:
        Control(whole_job(), torch.device("cpu")).agree(plan, [])
    except PolyrankError as error:
        return str(error)
    return "agreed"


def test_a_rank_with_another_plan_is_named_with_the_first_sample(ranks: Any) -> None:
    assert ranks(3, disagree, "none") == ["agreed"] * 3
    for message in ranks(3, disagree, "sample"):
        assert "step 8: ranks [2] planned another step" in message
        assert "first in sample 4 of the batch (id 4 on rank 0, 9 on rank 2)" in message


def test_every_bit_of_a_fingerprint_counts() -> None:
    digests = [0, 1, 1 << 32, 1 << 62, (1 << 63) - 1, (1 << 63) - 2]
    said = {tuple(notice(mock.Mock(digest=digest), [])) for digest in digests}
    assert len(said) == len(digests)


def stay_away(path: str) -> str:
    group = dist.new_group([0, 1, 2], timeout=timedelta(seconds=2))
    control = Control(group, torch.device("cpu"), dist.FileStore(path, 3))
    control.gather([1.0])
    if dist.get_rank() == 1:
        time.sleep(4)
        return "away"
    try:
        control.gather([2.0])
    except PolyrankError as error:
        return str(error)
    return "answered"


def test_a_rank_that_does_not_come_is_named(ranks: Any, tmp_path: Path) -> None:
    first, away, last = ranks(3, stay_away, str(tmp_path / "store"))
    assert away == "away"
    for message in (first, last):
        assert message.startswith("no word from rank 1, which has ended or hangs")
