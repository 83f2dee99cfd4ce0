"""Cells of the table of docs/encoders.md; `python -m tests.encoders_table` runs them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import encoders
from encoders.hf.write import written
from tests.encoders.family_checks import FOREIGN, MODELS, hold_generate, hold_round_trip
from tests.slow import on_demand

NAMES = [name for names in MODELS.values() for name in names]
OFTEN = ("dinov2_registers", "parakeet")


@pytest.mark.parametrize("name", on_demand(NAMES, [n for n in NAMES if n not in OFTEN]))
def test_greedy_answers_about_an_item_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    hold_generate(name, 11, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for family, names in MODELS.items() if family != FOREIGN for n in names])
@pytest.mark.parametrize("seed", [21, 22])
def test_an_encoder_written_back_is_the_folder_that_was_read(name: str, seed: int, tmp_path: Path) -> None:
    assert hold_round_trip(name, seed, tmp_path) == "yes"


def test_a_wav2vec2_folder_cannot_say_an_input_without_a_norm() -> None:
    """HuBERT's can; the class of wav2vec 2.0 always has one."""
    cls = encoders.resolve("wav2vec2")
    cfg = replace(cls.Config(), input_norm=False)
    with pytest.raises(ValueError, match="a wav2vec2 folder cannot say input_norm=False; it would be True"):
        written(cls, cfg)
    said = written(cls, replace(cfg, model_type="hubert"))
    assert said.config["model_type"] == "hubert" and said.config["feat_proj_layer_norm"] is False
