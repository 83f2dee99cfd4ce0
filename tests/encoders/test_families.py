"""Cells of the table of docs/encoders.md; `python -m tests.encoders_table` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.encoders.family_checks import MODELS, hold_generate
from tests.slow import on_demand

NAMES = [name for names in MODELS.values() for name in names]
OFTEN = ("dinov2_registers", "parakeet")


@pytest.mark.parametrize("name", on_demand(NAMES, [n for n in NAMES if n not in OFTEN]))
def test_greedy_answers_about_an_item_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    hold_generate(name, 11, tmp_path)
