"""Secrets of the environment and of URLs are in no file of a run, and in nothing that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mm.harness import free_port, run_job
from tests.mm.jobs.test_job import sensor_config
from tests.mm.shards import sensor_samples, write_shard

SECRET = "hunter2secret"
NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")


def test_no_file_of_a_run_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(8))
    config = sensor_config(tmp_path, checkpoint={"every": 1})
    urls = f"data.made_by=curl https://me:{SECRET}@host/x.tar 'https://host/y.tar?X-Amz-Signature={SECRET}'"
    argv = ["train", str(config), "eval.samples=1", urls]
    done = run_job([*argv, "train.steps=1", "run.report=true"], free_port())
    assert done.code == 0, done.err
    changed = urls.replace("host/x", "host/z")
    again = run_job([*argv[:-1], changed, "train.steps=2"], free_port())
    assert again.code == 0, again.err
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {"config.yaml", "log.txt", "report.html", "state.json"} <= {p.name for p in files}
    assert "host/z.tar" in (tmp_path / "run" / "config.yaml").read_text()
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in done.out + done.err + again.out + again.err
