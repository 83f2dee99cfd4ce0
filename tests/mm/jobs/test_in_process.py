"""Whole jobs of one rank in this process, as `python -m mm` runs them, and what they must give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llm.flops import flops
from mm.ranks.job import open_data
from mm.ranks.skipped import Skip
from mm.train.one_step import train_step
from tests.encoders.helpers import png
from tests.mm import reference
from tests.mm.harness import free_port, run_job, running, small
from tests.mm.shards import npy, sensor_samples, write_shard


def sensor_config(folder: Path, **sections: Any) -> Path:
    """A config of a sensor and a small language model over the shards in `folder`."""
    sections = {"data": {"train": ["sensor-*.tar"]}, **sections}
    raw = small(run={"dir": str(folder / "run")}, **sections)
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}}
    raw["model"] = {"sensor": sensor, "llm": raw["model"]["llm"]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    samples = sensor_samples(12)
    for sample in samples:
        sample["parts"] = {k: npy(np.full((4, 3), np.inf)) for k in sample["parts"]}
    write_shard(tmp_path / "sensor-000000.tar", samples)
    ended = run_job(["train", str(sensor_config(tmp_path))], free_port())
    assert ended.code == 5 and "nothing was updated" in ended.err and "Traceback" not in ended.err
    assert "an input of module sensor is not finite on rank 0 (micro-batch 0, sample" in ended.err
    assert "data.skip=[1]" in ended.err
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_that_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    train = {"steps": 4, "global_batch": 5, "warmup": 0.5}
    config = sensor_config(tmp_path, train=train, checkpoint={"every": 2, "keep": 0})
    assert run_job(["train", str(config)], free_port()).code == 0
    whole = metrics(tmp_path)
    assert [m["step"] for m in whole] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    assert run_job(["train", str(config)], free_port()).code == 0
    again = metrics(tmp_path)
    for key in ("step", "loss", "lr", "grad_norm", "tokens"):
        assert [m[key] for m in again] == [m[key] for m in whole], key


@pytest.mark.slow
def test_packed_sequences_of_a_blend_go_on_where_they_were(tmp_path: Path) -> None:
    for name, count in (("sensor", 20), ("other", 7)):
        write_shard(tmp_path / f"{name}-000000.tar", sensor_samples(count))
    names = ("sensor", "other")
    sources = [{"shards": str(tmp_path / f"{name}-*.tar"), "weight": 1, "name": name} for name in names]
    longest = 64
    config = sensor_config(
        tmp_path,
        data={"train": sources, "pack": longest, "context": longest, "window": 9},
        train={"steps": 6, "global_batch": 2, "warmup": 0.5},
        checkpoint={"every": 3, "keep": 0},
    )
    first = run_job(["train", str(config)], free_port())
    assert first.code == 0, first.err
    whole = metrics(tmp_path)
    assert set(whole[-1]["drawn_by_source"]) == set(names)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    assert run_job(["train", str(config)], free_port()).code == 0
    again = metrics(tmp_path)
    for key in ("step", "loss", "lr", "grad_norm", "tokens", "drawn_by_source"):
        assert [m[key] for m in again] == [m[key] for m in whole], key
    write_shard(tmp_path / "other-000001.tar", sensor_samples(2))
    refused = run_job(["train", str(config)], free_port())
    assert refused.code == 4 and "source other had 7 samples, now 9" in refused.err


def pictured(folder: Path, name: str, pictures: list[bytes]) -> dict[str, Any]:
    """A config whose data are samples that differ in their picture and in what depends on it."""
    samples = [
        {
            "key": f"s{k}",
            "segments": [{"vision": "img0.png"}, {"text": "sees "}, {"text": "ab"[k], "depends": "vision"}],
            "parts": {"img0.png": picture},
        }
        for k, picture in enumerate(pictures)
    ]
    write_shard(folder / f"{name}-000000.tar", samples)
    raw = small(data={"train": [str(folder / f"{name}-*.tar")]}, train={"global_batch": 2})
    del raw["model"]["audio"]
    return raw


def mean_loss(raw: dict[str, Any]) -> float:
    """Mean loss of the letters, which depend on the picture: two tokens from the end, where the end marker is
    the last label."""
    nets = reference.build(raw)
    language = reference.Language(nets["llm"])  # type: ignore[arg-type]
    total = 0.0
    for _, sample in reference.read(raw["data"]["train"]):
        ids, labels, entering = reference.sequence(sample, nets)
        only = [label if k == len(ids) - 3 else -100 for k, label in enumerate(labels)]
        before = language.totals["next"]
        language.learn(ids, only, entering, reference.Counts(tokens=1, next=1))
        total += language.totals["next"] - before
    return total / 2


def test_the_lift_is_the_loss_with_exchanged_pictures_minus_that_without(tmp_path: Path, alone: Any) -> None:
    from mm.train.evaluate import evaluate

    pictures = [png(8, 8, seed=1), png(4, 12, seed=2)]
    raw = pictured(tmp_path, "own", pictures)
    exchanged = pictured(tmp_path, "other", pictures[::-1])

    def lift() -> tuple[float, float]:
        with running(raw) as (job, feed):
            found = evaluate(job, open_data(job, feed.index), feed.index.samples, seed=0)
        return found.intact["vision"], found.lift["vision"]

    ((intact, gain),) = alone(1, lift)
    own, other = mean_loss(raw), mean_loss(exchanged)
    assert intact == pytest.approx(own, rel=1e-12) and gain == pytest.approx(other - own, rel=1e-9)
    assert abs(gain) > 1e-3


def test_an_unreadable_sample_leaves_the_modules_in_training(tmp_path: Path, alone: Any) -> None:
    from mm.train.evaluate import evaluate

    raw = pictured(tmp_path, "own", [png(8, 8, seed=1), png(4, 12, seed=2)])

    def modes() -> tuple[list[Skip], set[bool], set[bool]]:
        warned: list[Skip] = []
        with running(raw) as (job, feed):
            shard = tmp_path / "own-000000.tar"
            payload = bytearray(shard.read_bytes())
            payload[payload.index(b"sees ")] ^= 1  # the json of the first sample no longer matches the index
            shard.write_bytes(bytes(payload))
            before = {sub.training for part in job.modules() for sub in part.modules()}
            evaluate(job, open_data(job, feed.index), feed.index.samples, seed=0, leave_out=warned.extend)
            return warned, before, {sub.training for part in job.modules() for sub in part.modules()}

    ((warned, before, after),) = alone(1, modes)
    assert [skip.key for skip in warned] == ["s0"]
    assert before == after == {True}


def test_flops_of_a_step_are_three_forwards(alone: Any) -> None:
    raw = small(train={"global_batch": 3})
    raw["model"]["audio"]["freeze"] = "all"

    def one() -> dict[str, Any]:
        with running(raw) as (job, feed):
            plan = feed.next(0, 1)[0].plan
            lengths = [n for mb in plan.microbatches for n in mb.length]
            forward = {"llm": flops(job.blueprint.llm, lengths, plan.supervised)}
            for m, edge in plan.microbatches[0].edges.items():
                use = job.blueprint.inputs.encoders[m]
                project = 2.0 * 24 * (use.cls.feature_width(use.cfg) + job.blueprint.llm.d_model)
                forward[m] = sum(use.cls.cost(use.cfg, i.part.meta) + i.rows * project for i in edge.items)
            return {"forward": forward, "step": train_step(job, feed, 0).flops_by_module}

    (found,) = alone(1, one)
    times = {"vision": 3, "audio": 1, "llm": 3}
    assert found["step"] == pytest.approx({m: times[m] * f for m, f in found["forward"].items()})
    assert torch.tensor(list(found["forward"].values())).min() > 0
