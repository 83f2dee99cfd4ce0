"""The average of weights in a job: the same in any layout, kept by checkpoints, evaluated and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.hf import load_hf
from mm.checkpoint import saver
from mm.checkpoint import state as checkpoint
from mm.checkpoint.folders import export_hf
from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.ranks.feed import prepare
from mm.train.one_step import train_step
from mm.train.step import run_step
from mm.train.weights import averaged
from tests.mm.checkpoint.runs import contents
from tests.mm.harness import CONFIGS, Held, running, small, weigh

TRAIN = {"average": 0.6, "lr": 0.02, "warmup": 0.0}
MIXED = {
    "vision": {"cp": 2, "data_parallel": "replicate"},
    "audio": {"ranks": "0-1"},
    "llm": {"ranks": [2, 1, 3, 0], "tp": 2, "ep": 2, "etp": 2},
}


def steps(raw: dict[str, Any], folder: str, first: int, last: int) -> tuple[list[Held], Held, list[float]]:
    """After each step the weights here; then their average; losses with weights, average and weights."""
    with running(raw) as (job, feed):
        if first:
            checkpoint.load(job, feed.index, Path(folder) / f"step-{first:08d}")
        weights = []
        for step in range(first, last):
            train_step(job, feed, step)
            weights.append(weigh(job))
        samples = feed.index.usable[:6]

        def loss() -> float:
            result = run_step(job, prepare(0, samples, feed._assembler), train=False)
            return float(job.control.gather([result.losses.sum()]).sum())

        losses = [loss()]
        with averaged(job):
            held = weigh(job)
            losses.append(loss())
        losses.append(loss())
        saver.save(job, feed.index, Path(folder), last, feed.bad)
        return weights, held, losses


def test_it_is_the_average_in_any_layout_and_after_a_resume(ranks: Any, tmp_path: Path) -> None:
    alone, moved = str(tmp_path / "alone"), str(tmp_path / "moved")
    weights, held, losses = ranks(1, steps, small(train=TRAIN), alone, 0, 3)[0]
    for name, (_, value) in held.items():
        expected = weights[0][name][1]
        if not name.endswith("expert_bias"):
            for later in weights[1:]:
                expected = 0.6 * expected + 0.4 * later[name][1]
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-15, err_msg=name)
    assert losses[0] == losses[2] != losses[1]
    ranks(4, steps, small(train=TRAIN, layout=MIXED, schedule={"microbatches": 2}), moved, 0, 2)
    piped = small(train=TRAIN, layout={"llm": {"pp": 2, "data_parallel": "zero3"}})
    assert ranks(2, steps, piped, moved, 2, 3)[0][2] == pytest.approx(losses, rel=1e-9)
    one, other = (contents(Path(run) / "step-00000003") for run in (alone, moved))
    assert one.keys() == other.keys() and any(".average." in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-11, msg=name)
    export_hf(Path(moved) / "step-00000003", tmp_path / "out", None, average=True)
    model = load_hf(tmp_path / "out", dtype=torch.float64).model
    head = dict(model.named_parameters())["head"]
    torch.testing.assert_close(head.detach(), one["llm.average.head.value"], rtol=1e-8, atol=1e-11)


def test_an_average_that_is_not_kept_is_refused() -> None:
    with pytest.raises(Refused, match="no average is kept"):
        from_mapping(small(eval={"average": True}), CONFIGS)
