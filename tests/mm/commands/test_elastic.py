"""A run that is started on another number of ranks has the layout that its config gives for it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.commands import elastic
from mm.commands.elastic import for_world
from mm.config.schema import Config, from_mapping, resolve
from mm.errors import PolyrankError, Refused
from tests.mm.harness import Ended, free_port, run_job, run_rank, small
from tests.mm.jobs.test_job import sensor_config
from tests.mm.shards import sensor_samples, write_shard
from tests.slow import on_demand

TWO = {"layout": {"llm": {"tp": 2}}, "schedule": {"microbatches": 2}}


def config(folder: Path, **counts: str) -> Config:
    (folder / "two.yaml").write_text(yaml.safe_dump(TWO))
    by_count = {int(k[1:]) if k != "other" else k: v for k, v in counts.items()}
    raw = {**small(run={"dir": str(folder / "run")}), "elastic": by_count}
    return from_mapping(raw, folder)


def test_a_count_has_its_file_and_others_the_config(tmp_path: Path) -> None:
    cfg = config(tmp_path, n2="two.yaml", n4="gone.yaml")
    two = for_world(cfg, 2, lead=False)
    assert two.layout == TWO["layout"] and two.schedule.microbatches == 2
    assert for_world(cfg, 3, lead=False) is cfg
    assert for_world(config(tmp_path, other="two.yaml"), 5, lead=False).layout == TWO["layout"]
    with pytest.raises(Refused, match=r"elastic\.4: .*gone\.yaml"):
        for_world(cfg, 4, lead=False)
    with pytest.raises(Refused, match=r"elastic"):
        from_mapping({**small(), "elastic": {"some": "two.yaml"}}, tmp_path)


def test_one_process_plans_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, planned = config(tmp_path, other="plan:cpu-gloo"), list[str]()

    def plan(cfg: Config, world: int, hardware: str) -> dict[str, Any]:
        time.sleep(0.2)
        planned.append(f"{world} {hardware}")
        return {**TWO, "overrides": {"train.recompute": "true", "schedule.ahead": "null"}}

    monkeypatch.setattr(elastic, "_planned", plan)
    found: list[Config] = []
    others = [threading.Thread(target=lambda: found.append(for_world(cfg, 2, lead=False))) for _ in range(2)]
    for thread in others:
        thread.start()
    found.append(for_world(cfg, 2, lead=True))
    for thread in others:
        thread.join()
    assert planned == ["2 cpu-gloo"] and resolve(found[0]) == resolve(found[1]) == resolve(found[2])
    assert found[0].layout == TWO["layout"] and found[0].train.recompute is True
    for_world(cfg, 2, lead=True)
    assert len(planned) == 1, "the next start has it already"
    assert for_world(cfg, 3, lead=True, write=False).layout == TWO["layout"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["elastic-2.yaml"]
    (tmp_path / "run" / "elastic-2.yaml").write_text("layout: 5")
    for_world(cfg, 2, lead=True)
    assert len(planned) == 3, "damage is planned again"
    monkeypatch.setattr(elastic, "SECONDS", -cfg.run.timeout_s)
    with pytest.raises(PolyrankError, match=r"no layout has come in .*elastic-7\.yaml"):
        for_world(cfg, 7, lead=False)


@pytest.mark.parametrize("other", on_demand(["one.yaml", "plan:cpu-gloo"], ["plan:cpu-gloo"]))
def test_a_run_goes_on_on_fewer_ranks_without_a_hand_on_it(other: str, tmp_path: Path, ranks: Any) -> None:
    """From two ranks to one; the steps are those of one run on one rank."""
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    path = sensor_config(tmp_path, checkpoint={"every": 1})
    raw = yaml.safe_load(path.read_text()) | {"elastic": {2: "two.yaml", "other": other}}
    path.write_text(yaml.safe_dump(raw))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(TWO))
    (tmp_path / "one.yaml").write_text("layout: {llm: {tp: 1}}")
    argv = ["train", str(path), "eval.samples=1", "train.warmup=0", "train.decay=0", "train.average=null"]
    on_two: list[Ended] = ranks(2, run_rank, [*argv, "train.steps=2"], free_port())
    assert [e.code for e in on_two] == [0, 0], on_two[0].err
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["layout"] == TWO["layout"]
    on_one = run_job([*argv, "train.steps=4"], free_port())
    assert on_one.code == 0, on_one.err
    assert ("planning a layout of 1 ranks" in on_one.out) == other.startswith("plan:")
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()
    whole = run_job([*argv, "train.steps=4", f"run.dir={tmp_path}/whole", "elastic={}"], free_port())
    assert whole.code == 0, whole.err

    def losses(run: str) -> list[float]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [r["loss"] for r in map(json.loads, lines) if "loss" in r]

    assert losses("run") == pytest.approx(losses("whole"), rel=1e-9) and len(losses("run")) == 4
