"""What may be different when a run resumes: freely, with a word, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mm.checkpoint.course import FREE, KEPT, changes, refused, worth_saying
from mm.config.schema import Config, from_mapping, shown
from tests.mm.harness import CONFIGS, free_port, run_job, small
from tests.mm.jobs.test_job import sensor_config
from tests.mm.shards import sensor_samples, write_shard


def of(**sections: Any) -> dict[str, Any]:
    return shown(from_mapping(small(**sections), CONFIGS))


def kept(**sections: Any) -> dict[str, Any]:
    """As a checkpoint has it."""
    config: dict[str, Any] = json.loads(json.dumps(of(**sections)))
    return config


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, []),
        ({"train": {"lr": 0.5}}, ["train.lr was 0.01, now 0.5"]),
        ({"train": {"betas": [0.9, 0.9]}}, ["train.betas was [0.9, 0.95], now [0.9, 0.9]"]),
        ({"train": {"dtype": "float32"}}, ["train.dtype was float64, now float32"]),
        ({"train": {"decay": 0.5, "steps": 9}}, ["train.steps was 3, now 9", "train.decay was 0.2, now 0.5"]),
        ({"train": {"lr_by": {"llm": 0.1}}}, ["train.lr_by.llm was not there, now 0.1"]),
        ({"train": {"average": 0.9}}, ["train.average was null, now 0.9"]),
        ({"data": {"overlong": "skip"}}, ["data.overlong was refuse, now skip"]),
        # Nothing of these is learned.
        ({"run": {"dir": "elsewhere", "nproc": 8, "report": True, "trace": 2}}, []),
        ({"layout": {"llm": {"tp": 2}}, "schedule": {"microbatches": 3}}, []),
        ({"checkpoint": {"every": 7, "keep": 0}, "eval": {"samples": 3}}, []),
        ({"data": {"workers": 5, "prefetch": 4}, "train": {"statistics": 2, "recompute": "layers"}}, []),
    ],
)
def test_what_changes_the_course_is_said(now: dict[str, Any], said: list[str]) -> None:
    found = changes(kept(), of(**now))
    assert [str(c) for c in worth_saying(found)] == said
    assert refused(found) == ""
    assert bool(found) == bool(now)


def test_what_a_run_cannot_resume_with_is_listed() -> None:
    raw = small(run={"seed": 2}, train={"global_batch": 8})
    raw["model"]["llm"]["mlp_ffn"] = 96
    raw["model"]["vision"]["options"]["width"] = 48
    found = changes(kept(), shown(from_mapping(raw, CONFIGS)))
    assert refused(found).split("; ") == [
        "run.seed was 1, now 2",
        "model.vision.options.width was 24, now 48",
        "model.llm.mlp_ffn was 48, now 96",
        "train.global_batch was 12, now 8",
    ]
    assert worth_saying(found) == []
    del raw["model"]["audio"]
    many = refused(changes(kept(), shown(from_mapping(raw, CONFIGS))))
    assert "model.audio.encoder was fastconformer, now not there" in many and many.endswith(" more")


def test_a_run_says_what_is_different_from_here_on(tmp_path: Path) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(12))
    config = sensor_config(tmp_path, checkpoint={"every": 1})
    argv = ["train", str(config), "eval.samples=1"]
    assert run_job([*argv, "train.steps=1"], free_port()).code == 0
    again = run_job([*argv, "train.steps=2", "train.lr=0.5", "run.trace=2"], free_port())
    assert again.code == 0, again.err
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resumed from" in log
    assert [x for x in log.splitlines() if x.startswith("changed since")] == [
        "changed since step-00000001: train.steps was 1, now 2",
        "changed since step-00000001: train.lr was 0.01, now 0.5",
    ]
    refused = run_job([*argv, "train.steps=3", "run.seed=9"], free_port())
    assert refused.code == 4 and "run.seed was 1, now 9" in refused.err
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(12, seed=3))
    refused = run_job([*argv, "train.steps=3"], free_port())
    assert refused.code == 4, refused.err
    assert "shard sensor-000000.tar has other texts or keys (changed: " in " ".join(refused.err.split())


def field_of(key: str) -> object:
    """What the schema has under a dotted key; raises KeyError where it has nothing."""
    section: Any = Config
    for name in key.split("."):
        found = section.model_fields[name].annotation
        section = found if isinstance(found, type) and issubclass(found, BaseModel) else None
    return section


@pytest.mark.parametrize("key", [*FREE, *KEPT])
def test_every_key_is_one_of_the_config(key: str) -> None:
    field_of(key)
