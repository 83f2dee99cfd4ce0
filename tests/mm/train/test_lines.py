"""Files of a run on a disk that is full, and files that were damaged."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm.train.lines import Lines, forget_after
from tests.mm.harness import free_port, run_job
from tests.mm.jobs.test_job import sensor_config
from tests.mm.shards import sensor_samples, write_shard


@contextmanager
def largest(size: int) -> Iterator[None]:
    """Files of this process may not grow beyond so many bytes: what is behind that is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, said.append)
    with largest(25):
        for n in range(4):  # of ten bytes: the third fits half
            assert lines.write(f"number {n}\n\n") == 10
    assert path.read_bytes() == b"number 0\n\nnumber 1\n\n"
    (first,) = said
    assert first.startswith(f"{path} cannot be written: File too large") and lines.lost == 2
    lines.write("on\n")
    assert said[1:] == [f"{path} can be written again; lost so far: 2 lines"]
    with largest(25):
        lines.write("number 5\n\n")
    assert len(said) == 3 and lines.lost == 3
    lines.close()
    assert path.read_bytes() == b"number 0\n\nnumber 1\n\non\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_is_said_once() -> None:
    said: list[str] = []
    lines = Lines(Path("/dev/full"), said.append)
    for _ in range(3):
        lines.write("lost\n")
    lines.close()
    assert said == ["/dev/full cannot be written: No space left on device; lines are lost from here on"]


def test_a_file_that_was_removed_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    lines = Lines(tmp_path / "log", said.append)
    lines.write("kept\n")
    (tmp_path / "log").unlink()
    for _ in range(2):
        lines.write("lost\n")
    lines.close()
    assert said == [f"{tmp_path / 'log'} cannot be written: it was removed; lines are lost from here on"]


def test_a_file_begins_anew_or_goes_on(tmp_path: Path) -> None:
    for begin, text in ((True, "a\n"), (False, "b\ud800\n"), (True, "c\n")):
        lines = Lines(tmp_path / "log", print, begin=begin)
        lines.write(text)
        lines.close()
        if not begin:
            assert (tmp_path / "log").read_bytes() == b"a\nb\\ud800\n"
    assert (tmp_path / "log").read_bytes() == b"c\n"


NO_STEP = [b"null", b"[1]", b"5", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}']
DAMAGE = [b"\xff\xfe\x00", *NO_STEP, b"[" * 99999]


def test_damage_is_left_out_and_counted(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    good = [json.dumps({"step": n, "loss": 0.1 * n}).encode() for n in range(1, 6)]
    path.write_bytes(b"\n".join([*good[:2], *DAMAGE, *good[2:]]) + b'\n{"step": 6, "lo')
    forget_after(path, 3, said.append)
    assert path.read_bytes() == b"\n".join(good[:3]) + b"\n"
    assert said == [f"{path}: {len(DAMAGE) + 1} damaged lines left out"]
    forget_after(path, 3, said.append)
    forget_after(tmp_path / "not there", 3, said.append)
    assert len(said) == 1 and os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_records(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", list[str]()
    before = b"".join(json.dumps({"step": n}).encode() + b"\n" for n in range(99))
    path.write_bytes(before)
    with largest(100):
        forget_after(path, 50, said.append)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    assert "keeps the records of steps after 50: File too large" in said[0]


@pytest.mark.parametrize("unwritable", ["go_on", "stop"])
def test_a_run_whose_disk_is_full_goes_on_or_ends_saved(
    unwritable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(8))
    config = sensor_config(tmp_path, checkpoint={"every": 9})
    add = Lines._add

    def full(lines: Lines, data: bytes) -> None:
        if data.startswith(b'{"step": ') and not data.startswith(b'{"step": 1,'):
            raise OSError(28, "No space left on device")
        add(lines, data)

    monkeypatch.setattr(Lines, "_add", full)
    done = run_job(
        ["train", str(config), "train.steps=4", "eval.samples=1", f"run.unwritable={unwritable}"], free_port()
    )
    assert done.code == 0, done.err
    assert done.err.count("No space left on device; lines are lost") == 1
    saved = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert saved == ["step-00000004" if unwritable == "go_on" else "step-00000003"]
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1]
