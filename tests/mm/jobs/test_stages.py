"""Stages follow one another, each from what those before have left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.mm.harness import free_port, run_job, run_rank, small
from tests.mm.shards import sensor_samples, write_shard

STAGES = [
    {"name": "projector", "steps": 2, "train": ["sensor.projector"], "lr": 0.05},
    {"name": "all", "steps": 3, "global_batch": 4, "checkpoint": {"every": 1}},
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two stages of a sensor and a language model."""
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    raw = small(
        data={"train": ["sensor-*.tar"]}, run={"dir": str(tmp_path / "run")}, train={"global_batch": 5}
    )
    del raw["train"]["steps"]
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}}
    raw |= {"model": {"sensor": sensor, "llm": raw["model"]["llm"]}, "stages": STAGES}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_starts_from_the_weights_of_the_one_before(config: Path) -> None:
    run = config.parent / "run"
    ended = run_job(["train", str(config)], free_port())
    assert ended.code == 0, ended.err
    warm, rest = metrics(run / "projector"), metrics(run / "all")
    assert [m["step"] for m in warm] == [1, 2] and [m["step"] for m in rest] == [1, 2, 3]
    assert [m["grad_norm_by_module"]["llm"] > 0 for m in (*warm, *rest)] == [False] * 2 + [True] * 3
    # The config of a stage's run is whole: it names the weights that it started from.
    one = str(run / "all" / "config.yaml")
    again = run_job(["train", one, f"run.dir={config.parent / 'again'}"], free_port())
    assert again.code == 0, again.err
    assert [m["loss"] for m in metrics(config.parent / "again")] == [m["loss"] for m in rest]
    assert "weights of sensor, llm in memory from the stage before" in (run / "all" / "log.txt").read_text()
    assert f"weights of sensor, llm from {run}" in (config.parent / "again" / "log.txt").read_text()
    afresh = ["checkpoint.weights=null", f"run.dir={config.parent / 'afresh'}"]
    assert run_job(["train", one, *afresh], free_port()).code == 0
    assert metrics(config.parent / "afresh")[0]["loss"] != rest[0]["loss"]


def test_stages_that_are_done_are_passed_over_and_one_that_is_not_goes_on(config: Path) -> None:
    run = config.parent / "run"
    assert run_job(["train", str(config)], free_port()).code == 0
    whole = metrics(run / "all")
    shutil.rmtree(run / "all" / "step-00000003")
    ended = run_job(["train", str(config)], free_port())
    assert ended.code == 0 and "stage projector: done" in ended.out and "stage all: 3 steps" in ended.out
    assert [m["loss"] for m in metrics(run / "all")] == [m["loss"] for m in whole]
    ended = run_job(["train", str(config)], free_port())
    assert ended.code == 0 and "stage all: done" in ended.out


def test_the_data_of_a_later_stage_is_refused_before_the_first(config: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(config.read_text())
    raw["stages"][1]["data"] = {"context": 4}
    config.write_text(yaml.safe_dump(raw))
    ended = run_job(["train", str(config)], free_port())
    assert ended.code == 3 and "stage all: " in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "run" / "projector" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_one_stage_is_run_alone(config: Path) -> None:
    one = run_job(["train", str(config), "--stage", "projector"], free_port())
    assert one.code == 0 and not (config.parent / "run" / "all").exists()


@pytest.mark.slow
def test_a_stage_changes_the_layout_in_memory_as_through_a_checkpoint(config: Path, ranks: Any) -> None:
    """A module that the stage before lacked comes from the checkpoint of the one before that."""
    raw = yaml.safe_load(config.read_text())
    told = [{"key": f"t{i}", "segments": [{"text": f"level {i}"}], "parts": {}} for i in range(6)]
    write_shard(config.parent / "text-000000.tar", told)
    alone = {"name": "text", "steps": 2, "modules": [], "data": {"train": ["text-*.tar"]}}
    alone |= {"layout": {"llm": {"tp": 2}}}
    raw["stages"][0]["layout"] = {"sensor": {"ranks": [1]}, "llm": {"ranks": [0]}}
    raw["stages"][1]["layout"] = {"sensor": {"data_parallel": "zero3"}, "llm": {"ranks": [1, 0], "pp": 2}}
    raw["stages"].insert(1, alone)
    config.write_text(yaml.safe_dump(raw))
    run, apart = config.parent / "run", config.parent / "apart"
    ended = ranks(2, run_rank, ["train", str(config)], free_port(), timeout=300)
    assert [e.code for e in ended] == [0, 0], ended[0].err
    for stage in ("projector", "text", "all"):
        one = ["train", str(config), "--stage", stage, f"run.dir={apart}"]
        ended = ranks(2, run_rank, one, free_port(), timeout=300)
        assert [e.code for e in ended] == [0, 0], ended[0].err
        same = [[m["loss"], m["grad_norm"]] for m in metrics(run / stage)]
        assert [[m["loss"], m["grad_norm"]] for m in metrics(apart / stage)] == same
    said = (run / "all" / "log.txt").read_text()
    older = run / "projector" / "step-00000002"
    assert f"weights of sensor from {older}; of llm in memory from the stage before" in said
    assert "in memory" not in (apart / "all" / "log.txt").read_text()


def test_commands_on_one_run_name_the_stages(config: Path) -> None:
    ended = run_job(["train", str(config), "--virtual", "0", "--world", "1"], free_port())
    assert ended.code == 2 and "--stage, one of projector, all" in ended.err
