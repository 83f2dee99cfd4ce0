"""A run whose encoder has published weights: every rank holds its part of them, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from encoders.hf import load_hf
from mm.checkpoint.weights import fill_encoders
from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from mm.train.one_step import train_step
from parallel.published import module_tensors
from parallel.sharding.param import declared, local
from parallel.sharding.shard import held_indices
from tests.encoders import published
from tests.mm.harness import CONFIGS, running, small


def config(folder: Path, layout: dict[str, Any], **vision: Any) -> dict[str, Any]:
    raw = small(layout={"vision": layout})
    given = {"encoder": "dinov3", "weights": str(folder), "projector": {"kind": "linear", "bias": True}}
    raw["model"]["vision"] = {**given, **vision}
    raw["data"]["context"] = 160
    return raw


def first_loss(raw: dict[str, Any], folder: str) -> float:
    """Loss of the first step, after a look at what this rank holds of the encoder."""
    with running(raw) as (job, feed):
        fill_encoders(job)
        whole = {n: t.double() for n, t in module_tensors(load_hf(folder).encoder).items()}
        for part in job.parts.get("vision", {}).values():
            specs = {name: spec for name, _, spec in declared(part)}
            for name, tensor in module_tensors(part).items():
                if not name.startswith("encoder."):
                    continue
                held = held_indices(tuple(tensor.shape), specs[name], job.meshes["vision"])
                wanted = whole[name.removeprefix("encoder.")]
                for dim, index in enumerate(held):
                    wanted = wanted.index_select(dim, index)
                assert torch.equal(local(tensor), wanted), name
        return train_step(job, feed, 0).loss


def test_a_run_begins_with_published_weights(alone: Any, tmp_path: Path) -> None:
    folder = published.saved(published.oracle("dinov3", torch.float32), tmp_path / "model")
    assert alone(1, first_loss, config(folder, {}), str(folder))[0] > 0.0


@pytest.mark.slow
def test_each_rank_holds_its_part_of_published_weights(ranks: Any, tmp_path: Path) -> None:
    folder = published.saved(published.oracle("dinov3", torch.float32), tmp_path / "model")
    alone = ranks(1, first_loss, config(folder, {}), str(folder))[0]
    split = ranks(
        4, first_loss, config(folder, {"tp": 3, "ranks": "0-2", "sequence_parallel": True}), str(folder)
    )
    stages = ranks(4, first_loss, config(folder, {"pp": 2, "cp": 2}), str(folder))
    assert [*split, *stages] == pytest.approx([alone] * 8, rel=1e-9)


def test_options_and_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = published.saved(published.oracle("dinov3", torch.float32), tmp_path / "model")

    def refused(why: str, folder: Path = folder, **vision: Any) -> None:
        with pytest.raises(Refused, match=why):
            draw_up(from_mapping(config(folder, {}, **vision), CONFIGS), 1)

    blueprint = draw_up(from_mapping(config(folder, {}), CONFIGS), 1)
    assert blueprint.inputs.encoders["vision"].cfg.registers == 2
    native = {"pictures": {"fit": "none"}, "layers": 2, "final_norm": False}
    cfg = draw_up(from_mapping(config(folder, {}, options=native), CONFIGS), 1).inputs.encoders["vision"].cfg
    assert (cfg.pictures.fit, cfg.pictures.after_scale, cfg.layers, cfg.patch) == ("none", True, 2, 4)
    with pytest.raises(Refused, match=r"model.vision.options.pictures.fot; did you mean fit\?"):
        draw_up(from_mapping(config(folder, {}, options={"pictures": {"fot": 1}}), CONFIGS), 1)
    refused(
        r"model.vision.weights: .* has width=24, the options width=32; needed: the same",
        options={"width": 32},
    )
    refused("model.vision.weights: .* no encoder that is known here as clip", encoder="clip")
    refused("model.vision.weights: .* is no folder", folder=tmp_path / "none")
    refused(
        "projector.kind=none, but features are 96 wide",
        projector={"kind": "none"},
        encoder="dinov3",
        options={"merge": 2},
    )
    assert not dist.is_initialized()
