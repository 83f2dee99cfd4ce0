"""A run's folder has one run: whoever comes first, and however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm.cli import main
from mm.errors import Refused
from mm.ranks import claim
from mm.ranks.claim import CLAIM, claimed, this_process
from tests.mm.harness import CONFIGS, Ended, free_port, run_rank

CONFIG = str(CONFIGS / "digits.yaml")


@pytest.fixture(params=["locks", "no locks"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one without."""

    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(claim, "SETTLE_S", 0.1)
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def test_a_folder_has_one_run(disk: str, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    with claimed([folder, folder]) as held:
        assert len(held) == 1
        who = rf"another run is writing to run\.dir {folder} \(process {os.getpid()} on "
        with pytest.raises(Refused, match=who), claimed([folder]):
            pass
        with claimed([tmp_path]):
            pass
    assert not list(folder.iterdir()), "nothing is left behind"
    with claimed([folder]):
        pass


def race(folder: Path, runs: int) -> int:
    """How many of so many runs get a folder that they all want at once."""
    start, end = threading.Barrier(runs), threading.Barrier(runs)
    won: list[int] = []

    def run(n: int) -> None:
        start.wait()
        try:
            with claimed([folder], launch=f"run {n}"):
                won.append(n)
                end.wait()
        except Refused:
            end.wait()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(won)


def test_of_many_that_come_at_once_one_has_it(disk: str, tmp_path: Path) -> None:
    attempts = 20 if disk == "locks" else 3
    assert [race(tmp_path / str(n % 2), 8) for n in range(attempts)] == [1] * attempts


def test_without_locks_the_last_of_two_writers_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    write = claim._write

    def first(fd: int, here: claim.Holder) -> None:
        write(fd, here)
        write(fd, replace(here, pid=4711))  # of another run, which has read the empty claim too

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(claim, "SETTLE_S", 0.1)
    monkeypatch.setattr(claim, "_write", first)
    with pytest.raises(Refused, match="process 4711"), claimed([tmp_path]):
        pass
    assert (tmp_path / CLAIM).exists(), "it is the other's"


def test_a_claim_that_is_given_up_while_another_waits_for_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have opened the old file, which its holder removes before the second has locked it.
    lock, first = fcntl.flock, claimed([tmp_path])
    first.__enter__()

    def late(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed([tmp_path]), pytest.raises(Refused), claimed([tmp_path]):
        pass


HOLD = """
import os, sys, time
from pathlib import Path
from mm.ranks.claim import claimed
with claimed([Path(sys.argv[1])]) as held:
    if len(sys.argv) > 2 and os.fork() == 0:  # a process of the run that outlives it a little
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, *more: str) -> subprocess.Popen[str]:
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    return held


@pytest.mark.parametrize("more", [(), ("0.5",)], ids=["alone", "with a process"])
def test_a_dead_run_has_no_claim(more: tuple[str, ...], tmp_path: Path, processes: None) -> None:
    run = holder(tmp_path, *more)
    with pytest.raises(Refused, match=f"process {run.pid} on"), claimed([tmp_path]):
        pass
    run.kill()
    run.wait()
    with claimed([tmp_path]):
        assert json.loads((tmp_path / CLAIM).read_text())["pid"] == os.getpid()


def elsewhere(folder: Path, **other: Any) -> Path:
    """The claim of a process on another machine, on whose locks nothing is known here."""
    path = folder / CLAIM
    there = replace(this_process(), host="far", machine="another boot", **other)
    path.write_text(json.dumps(there.__dict__))
    return path


def test_a_run_on_another_machine_is_told_by_its_touches(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "QUIET_S", 0.6)
    monkeypatch.setattr(claim, "POLL_S", 0.05)
    path, done, said = elsewhere(tmp_path), threading.Event(), list[str]()

    def touch() -> None:
        while not done.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(Refused, match="on far"), claimed([tmp_path], say=said.append):
            pass
    finally:
        done.set()
        thread.join()
    assert "on far; looking for 0.6 s" in said[0]
    with claimed([tmp_path]):  # it has been quiet since
        pass


def test_a_run_that_is_started_again_elsewhere_takes_its_own_claim_at_once(tmp_path: Path) -> None:
    elsewhere(tmp_path, launch="ours")
    start = time.monotonic()
    with claimed([tmp_path], launch="ours"):
        pass
    assert time.monotonic() - start < claim.QUIET_S / 2


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "TOUCH_S", 0.02)
    with claimed([tmp_path]):
        before = (tmp_path / CLAIM).stat().st_mtime_ns
        until = time.monotonic() + 30
        while (tmp_path / CLAIM).stat().st_mtime_ns == before:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize("torn", ["", "{", "[]", "null", '{"pid": 1}'])
def test_a_claim_that_cannot_be_read_is_nobodys(torn: str, tmp_path: Path) -> None:
    (tmp_path / CLAIM).write_text(torn)
    with claimed([tmp_path]):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"), claimed([tmp_path / "file"]):
        pass


def test_a_second_launch_is_refused_before_it_starts_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed([tmp_path]):
        assert main(["train", CONFIG, f"run.dir={tmp_path}"]) == 2
        assert [p.name for p in tmp_path.iterdir()] == [CLAIM]
    err = capsys.readouterr().err
    assert err.startswith("Refused: another run is writing to run.dir") and err.count("\n") == 1


def test_ranks_of_a_second_job_are_all_refused(tmp_path: Path, ranks: Any) -> None:
    """Under torchrun the first rank claims, for all."""
    argv = ["train", CONFIG, f"run.dir={tmp_path}", "run.nproc=2"]
    with claimed([tmp_path]):
        ended: list[Ended] = ranks(2, run_rank, argv, free_port())
    assert [e.code for e in ended] == [2, 2]
    said = "".join(e.err for e in ended)
    assert said.count("Refused: another run is writing to run.dir") == 1 and "Traceback" not in said
    assert not (tmp_path / "log.txt").exists()


def test_ranks_keep_the_claim_of_a_launcher_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: None
) -> None:
    monkeypatch.setattr(claim, "ENDING_S", 0.3)
    code = f"""
import os, sys
from pathlib import Path
from mm.ranks import launch
from mm.ranks.claim import claimed
launch.sys.executable = sys.argv[1]  # runs what follows instead of `python -m mm`
with claimed([Path({str(tmp_path)!r})]) as held:
    launch.launch_local(1, [], claims=held)
"""
    rank = tmp_path / "rank.sh"
    rank.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid\nexec sleep 600\n"
    )
    rank.chmod(0o755)
    launcher = subprocess.Popen([sys.executable, "-c", code, str(rank)])
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    launcher.kill()
    launcher.wait()
    try:
        with pytest.raises(Refused), claimed([tmp_path]):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
