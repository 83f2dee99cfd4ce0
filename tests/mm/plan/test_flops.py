"""FLOPs of a step where modules are frozen."""

from __future__ import annotations

from typing import Any

from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.plan.flops import step_flops
from mm.plan.made_up import made_up_index
from mm.report.plan_json import first_step
from tests.mm.harness import CONFIGS, SMALL, small


def flops(**freeze: Any) -> dict[str, float]:
    """Of a step by module; freeze: by module, as in the config."""
    model = {m: {**SMALL["model"][m], "freeze": how} for m, how in freeze.items()}
    blueprint = draw_up(from_mapping(small(model=model), CONFIGS), 1)
    return step_flops(blueprint, first_step(blueprint, made_up_index(blueprint)))


def test_gradients_that_pass_through_a_frozen_language_model_count() -> None:
    whole = flops()["llm"]
    passed_on = flops(llm=True)["llm"]
    assert 2 / 3 * whole < passed_on < 0.8 * whole  # but for attention and the scan, two of three products
    assert flops(llm=True, vision="all", audio="encoder")["llm"] == passed_on  # a projector learns too


def test_a_language_model_above_which_and_below_which_nothing_learns_has_a_forward_alone() -> None:
    everything = {"llm": True, "vision": "all", "audio": "all"}
    assert flops(**everything) == {m: n / 3 for m, n in flops().items()}
