"""A whole job whose data is in an object store is the job on local files, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mm.data.remote.server import s3_server
from tests.pages import ROOT

NEEDED = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDED), reason=f"{NEEDED} not installed: pip install -e '.[remote,remote-test]'"
    ),
]
DATA = ROOT / "configs" / "data"


def train(folder: Path, env: dict[str, str], *options: str) -> list[dict[str, object]]:
    """Three steps of the default job on two ranks; returns their metrics."""
    command = [
        sys.executable,
        "-m",
        "mm",
        "train",
        "configs/digits.yaml",
        "--nproc",
        "2",
        f"run.dir={folder}",
    ]
    command += ["train.steps=3", "eval.samples=8", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_job_on_a_store_is_the_local_job(
    tmp_path: Path, processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, and without one by worker processes that read what they decode next together."""
    import fsspec

    local = train(tmp_path / "local", dict(os.environ))
    with s3_server() as server:
        keys = {
            "AWS_ACCESS_KEY_ID": "KEY",
            "AWS_SECRET_ACCESS_KEY": "HIDDEN",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in {**keys, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        fs.mkdir("shards")
        for path in DATA.glob("*.tar"):
            fs.pipe_file(f"s3://shards/{path.name}", path.read_bytes())
        given = ["data.train=[s3://shards/digits-train-*.tar]", "data.eval=[s3://shards/digits-eval-*.tar]"]
        for k, options in enumerate([[], ["data.workers=1", "data.remote.cache_bytes=0"]]):
            server.faults += ["500", "short"]
            cache = tmp_path / f"cache{k}"
            there = train(
                tmp_path / f"there{k}", dict(os.environ), f"data.remote.cache={cache}", *given, *options
            )
            assert not server.faults
            assert [losses(line) for line in there] == [losses(line) for line in local]
            kept = {p.name.partition("-")[0] for p in cache.iterdir()}
            assert kept == {"index"} if options else {"blocks", "entries", "index"}
            assert "HIDDEN" not in (tmp_path / f"there{k}" / "config.yaml").read_text()


def losses(line: dict[str, object]) -> list[object]:
    """What a line of metrics.jsonl says of the model, without times."""
    return [line.get(key) for key in ("step", "loss", "grad_norm", "eval_loss", "tokens")]
