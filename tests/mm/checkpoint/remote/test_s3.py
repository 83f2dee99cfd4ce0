"""Copies to a real S3 server, which the test starts, with faults on the way; jobs that lose their disk."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.checkpoint.remote.copies import Copies, write_index
from mm.checkpoint.remote.index import RemoteIndex
from mm.checkpoint.remote.shown import list_remote, verify_remote
from mm.checkpoint.remote.start import fetch_newer
from mm.cli import main
from mm.config.schema import CheckpointConfig, from_mapping
from mm.data.remote import folder as folders
from mm.data.remote.client import Client
from mm.data.remote.folder import Folder
from mm.data.remote.retry import Limits, Unreachable
from mm.errors import CheckpointError
from parallel import checkpoint as store
from tests.mm.checkpoint.remote.targets import all_of
from tests.mm.checkpoint.runs import written
from tests.mm.data.remote.server import Server, s3_for_the_process
from tests.mm.harness import CONFIGS, small
from tests.pages import ROOT

NEEDED = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDED), reason=f"{NEEDED} not installed: pip install -e '.[remote,remote-test]'"
    ),
]
LIMITS = Limits(timeout_s=2.0, attempts=4, pause_s=0.01)
SECRET = "hidden9secret"
PART = 5 << 20  # the least that S3 takes


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_for_the_process(SECRET) as server:
        yield server


@pytest.fixture
def url(server: Server, processes: None, tmp_path: Path) -> Iterator[str]:
    """A folder of a bucket of its own, without faults."""
    import fsspec

    server.faults.clear()
    server.writes.clear()
    server.delay_s, server.stall_s = 0.0, 3.0
    bucket = f"b{random.randrange(10**9)}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    yield f"s3://{bucket}/runs/one"
    server.faults.clear()
    server.writes.clear()


def copies_of(run: Path, url: str, session: str = "one", **rules: Any) -> Copies:
    folder = Folder(url, Client(LIMITS, warn=lambda line: None))
    return Copies(folder, run, CheckpointConfig(**rules, remote={"url": url}), "r", session, 0)


def large(run: Path, step: int) -> Path:
    """A checkpoint of which one file is written in three parts."""
    more = torch.randint(
        0, 255, (11 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
    )
    return written(run, step, **{"llm.large": more})


def same(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return names == sorted(p.name for p in other.iterdir()) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


def fetched(url: str, out: Path) -> bool:
    cfg = from_mapping(small(checkpoint={"remote": {"url": url, "timeout_s": 2.0}}), CONFIGS)
    return fetch_newer(cfg, out, None, {})


@pytest.mark.parametrize("fault", ["500", "503", "507", "reset", "short", "lost", "stall"])
def test_any_write_may_fail_once(
    server: Server, url: str, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a copy that removes another one in turn, the joining of parts among them."""
    monkeypatch.setattr(folders, "CHUNK", PART)
    large(tmp_path / "a", 1)
    large(tmp_path / "b", 2)
    count, k = 1, 0
    while k < count:
        run, there = tmp_path / "run", f"{url}/{fault}{k}"
        shutil.copytree(tmp_path / "a", run)
        copies = copies_of(run, there, keep=1)
        write_index(copies.folder, RemoteIndex("r"))
        copies.copy_one()
        shutil.copytree(tmp_path / "b" / "step-00000002", run / "step-00000002")
        before = len(server.asked)
        server.writes[:] = [""] * k + [fault]
        assert all_of(copies) == ["step-00000002"]
        assert not server.writes
        count = sum(method in ("PUT", "POST", "DELETE") for method, _, _ in server.asked[before:]) - 1
        if fault == "stall":
            count = 6  # they take long
        assert "step-00000001" not in list_remote(there, sums=k == 0)
        assert verify_remote(f"{there}/step-00000002").endswith("whole")
        shutil.rmtree(run)
        k += 1
    assert k >= 6


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "wrong", "stall"])
def test_a_fetch_gets_over_faults(server: Server, url: str, tmp_path: Path, fault: str) -> None:
    source = large(tmp_path / "run", 1)
    copies = copies_of(tmp_path / "run", url)
    write_index(copies.folder, RemoteIndex("r"))
    all_of(copies)
    server.faults += [fault, "", fault]
    assert fetched(url, tmp_path / "out")
    assert not server.faults and same(source, tmp_path / "out" / "step-00000001")


def test_wrong_bytes_that_stay_are_damage(server: Server, url: str, tmp_path: Path) -> None:
    written(tmp_path / "run", 1)
    copies = copies_of(tmp_path / "run", url)
    write_index(copies.folder, RemoteIndex("r"))
    all_of(copies)
    server.faults += ["", "", *["wrong"] * 40]
    # The store's own sums notice it where they are of the bytes that were asked for, else the manifest's.
    with pytest.raises(CheckpointError, match=r"(is damaged|cannot be fetched): .*(ChecksumE|differs)"):
        fetched(url, tmp_path / "out")
    server.faults[:] = ["wrong"] * 9  # of the index
    with pytest.raises(CheckpointError, match="is not known"):
        fetched(url, tmp_path / "out")
    assert not store.published(tmp_path / "out")


def test_denied_and_full_are_said(server: Server, url: str, tmp_path: Path) -> None:
    written(tmp_path / "run", 1)
    copies = copies_of(tmp_path / "run", url)
    write_index(copies.folder, RemoteIndex("r"))
    server.writes += ["403"] * 50
    with pytest.raises(PermissionError, match=r"writing s3://.*: access is denied") as denied:
        copies.copy_one()
    assert len(server.writes) == 49 and SECRET not in str(denied.value)
    server.writes[:] = ["507"] * 50
    with pytest.raises(Unreachable, match=r"\(HTTP 507\).*; 4 attempts have failed"):
        copies.copy_one()
    server.writes.clear()
    assert all_of(copies) == ["step-00000001"]
    nowhere = copies_of(tmp_path / "run", "s3://no-such-bucket/x")
    with pytest.raises(FileNotFoundError):
        write_index(nowhere.folder, RemoteIndex("r"))


def test_parts_of_a_copy_that_was_killed_are_dropped(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(folders, "CHUNK", PART)
    large(tmp_path / "run", 1)
    copies = copies_of(tmp_path / "run", url)
    left = "step-00000001.00000000"
    write_index(copies.folder, RemoteIndex("r", unfinished=(left,)))
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    bucket, key, _ = fs.split_path(url)
    name = next((tmp_path / "run" / "step-00000001").glob("*.distcp")).name
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{left}/{name}")
    assert len(fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]) == 1
    assert all_of(copies) == ["step-00000001"]
    assert not fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")


def test_commands_on_a_url(server: Server, url: str, tmp_path: Path, capsys: Any) -> None:
    source = written(tmp_path / "run", 1)
    copies = copies_of(tmp_path / "run", url)
    write_index(copies.folder, RemoteIndex("r"))
    all_of(copies)
    assert main(["checkpoint", "list", url, "--sums"]) == 0
    assert "step-00000001 (latest): 0.0 MiB; whole" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", f"{url}/step-00000001"]) == 0
    assert "after step 1, 5 tensors" in capsys.readouterr().out
    assert main(["checkpoint", "fetch", f"{url}/step-00000001", str(tmp_path / "out")]) == 0
    assert same(source, tmp_path / "out" / "step-00000001")


def command(folder: Path, url: str, *options: str) -> list[str]:
    sections = ["checkpoint.every=1", f"checkpoint.remote.url={url}", "checkpoint.remote.timeout_s=5"]
    job = [sys.executable, "-m", "mm", "train", "configs/digits.yaml", "--nproc", "2", f"run.dir={folder}"]
    return [*job, "train.steps=6", "eval.samples=8", *sections, *options]


def losses(folder: Path) -> list[Any]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_a_job_that_is_killed_as_it_copies_and_loses_its_disk_goes_on(
    server: Server, url: str, tmp_path: Path
) -> None:
    """Bit for bit as one that was left alone, which copies nothing. No process of it is left."""
    plain = [part for part in command(tmp_path / "plain", url) if "remote" not in part]
    subprocess.run(plain, cwd=ROOT, check=True, capture_output=True, timeout=400)
    server.stall_s = 0.3
    server.writes += ["stall"] * 10_000
    job = subprocess.Popen(
        command(tmp_path / "run", url), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while True:
        assert time.monotonic() < deadline and job.poll() is None
        try:
            if "step-0" in list_remote(url).splitlines()[0] and "(latest)" in list_remote(url):
                break
        except CheckpointError:
            time.sleep(0.1)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    server.writes.clear()
    deadline = time.monotonic() + 20
    while str(tmp_path / "run") in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.1)
    shutil.rmtree(tmp_path / "run")
    server.faults += ["500", "reset", "wrong"]
    done = subprocess.run(
        command(tmp_path / "run", url), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetching s3://" in done.stdout and f"copied to {url}: step-00000006" in done.stdout
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "plain")
    assert ours and ours == theirs[-len(ours) :]
    assert verify_remote(f"{url}/step-00000006").endswith("whole")
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_a_job_whose_store_is_away_trains_to_its_end(server: Server, url: str, tmp_path: Path) -> None:
    server.writes[:] = ["", *["403"] * 10_000]  # the index, at the start
    options = ["checkpoint.remote.wait_s=1"]
    done = subprocess.run(
        command(tmp_path / "run", url, *options), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("cannot be copied") + done.stdout.count("cannot be copied") == 1
    assert "the last checkpoint is not copied" in done.stdout + done.stderr
    server.writes.clear()
    again = subprocess.run(
        command(tmp_path / "run", url), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert again.returncode == 0 and f"copied to {url}: step-00000006" in again.stdout
