"""Families of published models: logits and gradients of transformers, the same bytes back, any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm.hf import export_checkpoint
from parallel import checkpoint as checkpoint
from tests.llm.families import RANDOM
from tests.llm.family_checks import (
    cases,
    even_folder,
    hold_exact,
    hold_round_trip,
    hold_stages,
)
from tests.llm.folders import differing, into_layout, read_all
from tests.llm.test_whole import compare, run_rank
from tests.slow import on_demand

NAMES = list(RANDOM)
SEEDS = range(6)
# Together they have every way that tensors are fused, stacked and shared.
SHARDED = ("phi3", "olmo2", "granitemoehybrid")


@pytest.mark.parametrize("seed", on_demand(SEEDS, SEEDS[2:]))
@pytest.mark.parametrize("name", NAMES)
def test_any_model_of_a_family_is_that_of_transformers(tmp_path: Path, name: str, seed: int) -> None:
    hold_exact(name, seed, tmp_path, torch.float64, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_in_float32(tmp_path: Path, name: str, seed: int) -> None:
    hold_exact(name, seed, tmp_path, torch.float32, 1e-5)


@pytest.mark.parametrize("seed", on_demand(SEEDS, SEEDS[1:]))
@pytest.mark.parametrize("name", NAMES)
def test_bytes_there_and_back_and_the_same_logits(tmp_path: Path, name: str, seed: int) -> None:
    hold_round_trip(name, seed, tmp_path)


@pytest.mark.parametrize("name", on_demand(NAMES, [n for n in NAMES if n not in SHARDED]))
def test_straight_into_a_layout_and_back(tmp_path: Path, ranks: Any, name: str) -> None:
    cfg = even_folder(name, 0, tmp_path / "in")
    ranks(2, into_layout, str(tmp_path / "in"), cfg, {"tp": 2}, str(tmp_path / "job"))
    (saved,) = checkpoint.published(tmp_path / "job")
    export_checkpoint(saved, tmp_path / "out", cfg)
    assert not differing(read_all(tmp_path / "out"), read_all(tmp_path / "in"))
    hold_stages(cfg, tmp_path / "in")


@pytest.mark.parametrize("name", on_demand(NAMES, [n for n in NAMES if n != "granitemoehybrid"]))
def test_any_layout_is_one_process(tmp_path: Path, ranks: Any, name: str) -> None:
    found = list(cases(even_folder(name, 0, tmp_path)).values())
    results = ranks(2, run_rank, found)
    for i, case in enumerate(found):
        compare(case, [r[i] for r in results])
