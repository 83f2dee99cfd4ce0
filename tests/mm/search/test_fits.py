"""What would fit in the place of a layout that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mm.config.schema import Config, from_mapping
from mm.predict.hardware import load_hardware
from mm.predict.step import shortfall
from mm.search.fits import Fitting, fitting_lines, would_fit
from mm.search.predictor import Predictor
from tests.mm.harness import small

pytestmark = pytest.mark.slow  # predicts a job some forty times; test_plan_layout.py does it once

H100 = load_hardware("h100")


def config(recompute: object = False) -> Config:
    raw = small(
        data={"train": ["nothing-*.tar"], "context": 128}, layout={"llm": {"data_parallel": "replicate"}}
    )
    del raw["model"]["audio"]
    raw["train"] |= {"dtype": "bfloat16", "global_batch": 4, "recompute": recompute}
    return from_mapping(raw, Path())


@pytest.mark.parametrize("recompute", [False, {"vision": True}])
def test_what_fits_is_predicted_to_fit(recompute: object) -> None:
    """On devices with a little less than is needed, a change; with far less, more of them or nothing."""
    cfg = config(recompute)
    found = Predictor(cfg, 2, H100).of_config(cfg)
    tensors = found.peak_memory_bytes - H100.memory.reserved

    def with_room(share: float) -> tuple[list[Fitting], float]:
        room = H100.memory.reserved + share * tensors
        hardware = replace(H100, memory=replace(H100.memory, bytes=room))
        assert shortfall(found, hardware) is not None
        return would_fit(cfg, 2, hardware), room

    near, room = with_room(0.97)
    assert near and all(f.bytes <= room for f in near)
    assert [f.step_s for f in near[:-1]] == sorted(f.step_s for f in near[:-1])
    assert near[-1].change.startswith("--devices 4")
    assert any("=" in f.change for f in near)
    none, _ = with_room(0.0)
    assert none == [] and "nothing fits, up to 16 times as many devices" in fitting_lines(none)[0]
