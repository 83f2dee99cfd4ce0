"""Faults of partly frozen encoders, pictures in tiles, video and resamplers."""

from __future__ import annotations

from tests.mutations.fault import Fault

RESOLUTION = (
    Fault(
        "frozen.stage",
        "a later pipeline stage counts the frozen layers from its own first one",
        "encoders/module.py",
        "inside[: max(0, layers - first)]",
        "inside[:layers]",
        "tests/encoders/test_frozen_layers.py::test_a_stage_of_a_pipeline_has_its_own_of_the_first_layers",
    ),
    Fault(
        "frozen.flops",
        "frozen layers cost a backward",
        "mm/plan/trained.py",
        "frozen = enc.freeze_layers if",
        "frozen = 0 if",
        "tests/encoders/test_frozen_layers.py"
        "::test_a_pipeline_asks_for_no_gradient_below_the_lowest_trained_layer",
    ),
)
