"""A run that starts from published weights, or from another run's, takes exactly those."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm.config import LLMConfig
from llm.hf import load_hf
from mm.checkpoint import saver
from mm.checkpoint.folders import export_hf, import_hf
from mm.checkpoint.weights import start_from
from mm.config.schema import from_mapping
from mm.errors import CheckpointError
from mm.plan.blueprint import draw_up
from mm.ranks.job import build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.one_step import open_feed, train_step
from tests.llm.families import build, config_of, even, save
from tests.mm.harness import CONFIGS, small


def two_steps(raw: dict[str, Any], weights: str | None, save: str | None) -> list[float]:
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    index = open_index(blueprint, blueprint.cfg.data.train, CONFIGS)
    job = build_job(blueprint, RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    data = open_data(job, index)
    if weights is not None:
        start_from(job, [Path(weights)])
    feed = open_feed(job, data)
    try:
        losses = [train_step(job, feed, step).loss for step in range(2)]
        if save is not None:
            saver.save(job, index, Path(save), 2, ())
    finally:
        feed.close()
        job.close()
    return losses


@pytest.mark.slow
def test_weights_go_out_in_and_into_any_layout(ranks: Any, tmp_path: Path) -> None:
    raw = small()
    ranks(2, two_steps, small(layout={"llm": {"tp": 2}}), None, str(tmp_path / "run"))
    saved = tmp_path / "run" / "step-00000002"
    folder = tmp_path / "published"
    export_hf(saved, folder, None, "nemotron_h")  # the language model alone
    import_hf(folder, tmp_path / "again")
    copies = [str(folder), str(tmp_path / "again" / "step-00000000")]
    for at in copies:
        expected = ranks(1, two_steps, raw, at, None)[0]
        for layout in ({"tp": 2, "ep": 4}, {"pp": 2, "cp": 2}):
            got = ranks(4, two_steps, small(layout={"llm": layout}), at, None)[0]
            assert got == pytest.approx(expected, rel=1e-9)
    whole = ranks(1, two_steps, raw, str(saved), None)[0]
    disjoint = small(layout={"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}})
    assert ranks(4, two_steps, disjoint, str(saved), None)[0] == pytest.approx(whole, rel=1e-9)
    assert abs(whole[0] / expected[0] - 1) > 1e-3  # the encoders' weights too
    published = load_hf(folder).model
    assert isinstance(published.cfg, LLMConfig) and published.embed is not None
    named = draw_up(
        from_mapping({**raw, "model": {**raw["model"], "llm": {"preset": str(folder)}}}, CONFIGS), 1
    )
    assert asdict(named.llm)["pattern"] == "ME*-" and named.llm.d_model == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "granitemoehybrid"])
def test_a_family_is_trained_and_written_as_itself(ranks: Any, tmp_path: Path, name: str) -> None:
    given = even(name, 0) | {"vocab_size": 512}
    folder = str(save(build(config_of(name, given), torch.float64), tmp_path / "in"))
    raw = small()
    raw["model"]["llm"] = {"preset": folder}
    expected = ranks(1, two_steps, raw, folder, str(tmp_path / "one"))[0]
    for i, layout in enumerate(({"tp": 2}, {"cp": 2}, {"pp": 2})):
        run = tmp_path / f"run{i}"
        got = ranks(2, two_steps, {**raw, "layout": {"llm": layout}}, folder, str(run))[0]
        assert got == pytest.approx(expected, rel=1e-9)
        export_hf(run / "step-00000002", tmp_path / f"out{i}", None)
        trained = load_hf(tmp_path / f"out{i}").model.cfg
        assert trained == load_hf(folder).model.cfg
        assert trained.source is not None and trained.source.family == name
    with pytest.raises(CheckpointError, match="a Llama checkpoint cannot say"):
        export_hf(tmp_path / "one" / "step-00000002", tmp_path / "other", None, "llama")


def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        import_hf(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot export"):
        export_hf(tmp_path / "nothing", tmp_path / "out", None)
