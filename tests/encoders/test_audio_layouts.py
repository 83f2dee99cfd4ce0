"""Published audio encoders split over cp, tp, sequence parallelism and stages equal the whole encoder."""

from __future__ import annotations

from typing import Any

import pytest

from tests.encoders.test_context import LAYOUTS, compare
from tests.slow import on_demand

NAMES = ("whisper", "wav2vec2", "parakeet", "audioflamingo3")
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("wav2vec2", {"conv_norm": "layer", "norm_first": True, "conv_bias": True, "reach": 7}),
    ("wav2vec2", {"conv_norm": "layer", "reach": 128, "input_norm": False}),
    ("parakeet", {"bias": False, "conv_bias": False, "kernel": 31, "scaled": False}),
]
KINDS = [
    ("recompute", (2, 2, True)),
    ("stages", (2, 2, True)),
    ("stages", (3, 1, False)),
    ("frozen", (2, 2, True)),
]


@pytest.mark.parametrize("name", NAMES)  # clips of audioflamingo3 have odd numbers of tokens, or even ones
@pytest.mark.parametrize("layout", on_demand(LAYOUTS, [v for v in LAYOUTS if v != (2, 2, True)]), ids=str)
def test_a_split_encoder_is_the_whole_encoder(name: str, layout: tuple[int, int, bool], ranks: Any) -> None:
    assert max(ranks(layout[0] * layout[1], compare, name, layout, "plain", {})) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "extra"), SWITCHES, ids=str)
@pytest.mark.parametrize("layout", [(3, 1, False), (2, 2, True)], ids=str)
def test_its_switches_are_exact_too(
    name: str, extra: dict[str, Any], layout: tuple[int, int, bool], ranks: Any
) -> None:
    assert max(ranks(layout[0] * layout[1], compare, name, layout, "plain", extra)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "layout"), KINDS, ids=str)
def test_every_way_of_splitting_is_exact(
    name: str, kind: str, layout: tuple[int, int, bool], ranks: Any
) -> None:
    assert max(ranks(layout[0] * layout[1], compare, name, layout, kind, {})) < 1e-9
