"""Law 1 for the language model: every layout computes what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.llm.harness import EVERYTHING, TINY, Degrees, Text, assemble, far, run_rank, run_whole, tiny
from tests.slow import on_demand

MODELS = {
    **{pattern: tiny(pattern=pattern) for pattern in ("M", "*", "-", "E", TINY.pattern)},
    "everything": EVERYTHING,
    "softmax, no shared expert": tiny(
        pattern="E*", router="softmax", norm_top_k=False, shared_ffn=0, activation="gelu", aux_weight=0.5
    ),
    "all-gather": tiny(pattern="E", latent=6, dispatcher="all_gather"),
}
LAYOUTS = {
    "tp2": Degrees(2, tp=2),
    "tp2 sp": Degrees(2, tp=2, sp=True),
    "tp2 ep2 across tp": Degrees(2, tp=2, ep=2),
    "tp2 sp ep2 across tp": Degrees(2, tp=2, ep=2, sp=True),
    "dp2": Degrees(2),
    "dp2 ep2": Degrees(2, ep=2),
    "tp4 sp": Degrees(4, tp=4, sp=True),
    "tp4 ep2": Degrees(4, tp=4, ep=2),
    "tp2 dp2 ep2": Degrees(4, tp=2, ep=2),
    "tp2 dp2 ep4 across both": Degrees(4, tp=2, ep=4),
    "tp2 sp dp2 ep4 across both": Degrees(4, tp=2, ep=4, sp=True),
    "dp4 ep2": Degrees(4, ep=2),
}
TEXTS = [
    Text((11, 1, 18), 2, seed=1, rows_at=(0, 5, 6, 7, 29)),
    Text((), 4, seed=2),  # a rank without real tokens
    Text((20,), 0, seed=3, rows_at=(2, 3)),
    Text((3, 0, 2), 7, seed=4, rows_at=(4,)),
]


def layout_of(name: str, degrees: Degrees) -> Degrees:
    """Without experts, an expert axis is refused."""
    return degrees if "E" in MODELS[name].kinds else replace(degrees, ep=1)


def run_all(degrees: Degrees, texts: list[Text], recompute: bool) -> list[dict[str, Any]]:
    return [run_rank(cfg, layout_of(m, degrees), texts, recompute) for m, cfg in MODELS.items()]


CASES = [(n, False) for n in LAYOUTS] + [(n, True) for n, d in LAYOUTS.items() if d.world == 2]
OFTEN = [
    *(("tp2 sp", True), ("tp2 ep2 across tp", True), ("dp2 ep2", True), ("tp2", False), ("dp2", False)),
    *(("tp4 ep2", False), ("tp2 sp dp2 ep4 across both", False), ("dp4 ep2", False)),
]


@pytest.fixture(scope="module")
def whole() -> dict[tuple[str, int], dict[str, Any]]:
    """One-process results by model and number of texts."""
    return {(m, n): run_whole(cfg, TEXTS[:n]) for m, cfg in MODELS.items() for n in (1, 2, 4)}


@pytest.mark.parametrize(
    ("name", "recompute"),
    on_demand(CASES, [c for c in CASES if c not in OFTEN], several=True),
)
def test_every_layer_in_every_layout(
    name: str, recompute: bool, ranks: Any, whole: dict[tuple[str, int], dict[str, Any]]
) -> None:
    degrees = LAYOUTS[name]
    texts = TEXTS[: degrees.dp]
    results = ranks(degrees.world, run_all, degrees, texts, recompute)
    for i, model in enumerate(MODELS):
        compare(model, layout_of(model, degrees), [r[i] for r in results], whole[model, degrees.dp])


def compare(model: str, degrees: Degrees, results: list[dict[str, Any]], ref: dict[str, Any]) -> None:
    for rank, result in enumerate(results):
        dp = rank // degrees.tp
        torch.testing.assert_close(result["loss"], ref["loss"][dp], rtol=1e-9, atol=1e-12)
        for row, grad in result["rows"].items():
            torch.testing.assert_close(grad, ref["rows"][dp][row], rtol=1e-9, atol=1e-10)
    for dp in range(degrees.dp):
        seen = {row for r in results[dp * degrees.tp : (dp + 1) * degrees.tp] for row in r["rows"]}
        assert seen == set(ref["rows"][dp])
    assert not far(assemble(MODELS[model], degrees, results), ref["grads"]), model
    for layer, load in enumerate(ref["load"]):
        assert torch.equal(sum(r["load"][layer] for r in results), load)
    for name, value in ref["objectives"].items():
        counted = [r for r in results if name != "mtp" or r["tp"] == 0]
        total = sum(float(r["objectives"][name]) for r in counted)
        assert total == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
