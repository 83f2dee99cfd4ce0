"""Local ranks: exit codes, stopping the rest, signals, and one voice for a failing job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mm.errors import Refused
from mm.faults.failure import Failure
from mm.ranks import launch, stop
from mm.ranks.stop import block_requests


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, processes: None) -> Any:
    """run(n, code): launch_local with ranks that run `code`, which knows `rank`, instead of a job."""

    def start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        code = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n" + argv[0]
        return subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **env}, start_new_session=True
        )

    monkeypatch.setattr(launch, "_start", start)
    return lambda n, code: launch.launch_local(n, [code])


def ask_twice(folder: Path, pause_s: float) -> None:
    """Two requests to end to this process, so far apart, once a rank has left a file in `folder`."""

    def ask() -> None:
        while not list(folder.iterdir()):
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause_s)

    threading.Thread(target=ask, daemon=True).start()


@pytest.mark.parametrize(("codes", "job"), [([0, 0], 0), ([0, 3], 3), ([1, 5], 5), ([1, 0], 1), ([7, 0], 1)])
def test_the_exit_code_is_that_of_a_rank_with_a_known_reason(codes: list[int], job: int, run: Any) -> None:
    assert run(2, f"sys.exit({codes}[rank])") == job


def test_ranks_know_their_place(run: Any, tmp_path: Path) -> None:
    code = f"""
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
open({str(tmp_path)!r} + f"/{{rank}}", "w").write(" ".join(os.environ[n] for n in names))
"""
    assert run(3, code) == 0
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [f"{r} {r} 3 3 127.0.0.1" for r in range(3)]


def test_ranks_start_before_the_rest_is_checked_and_end_where_it_is_refused(run: Any, tmp_path: Path) -> None:
    def check() -> None:
        while not list(tmp_path.iterdir()):  # the rank runs already
            time.sleep(0.02)
        raise Refused("no such encoder")

    code = f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close(); time.sleep(20)"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Refused, match="no such encoder"):
        launch.launch_local(1, [code], check)
    assert signal.getsignal(signal.SIGTERM) is before
    stat = Path(f"/proc/{next(tmp_path.iterdir()).name}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        time.sleep(0.02)


def test_a_rank_that_comes_before_the_store_waits_for_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "PROGRESS_S", 0.05)
    code = f"""
import socket
ours = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
open({str(tmp_path)!r} + "/came", "w").close()
from mm.ranks.rendezvous import connect
connect(30.0).set("here", "")
"""

    def check() -> None:
        while not (tmp_path / "came").exists():
            time.sleep(0.1)

    assert launch.launch_local(1, [code], check) == 0
    assert capsys.readouterr().out.startswith("importing torch, 0 s\n")


def test_ranks_left_behind_by_a_failure_are_stopped(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    start = time.monotonic()
    assert run(2, "sys.exit(2) if rank else time.sleep(600)") == 2
    assert time.monotonic() - start < 60


def test_a_rank_ended_by_a_signal_is_named(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(2, "os.kill(os.getpid(), signal.SIGKILL) if rank else None") == 1
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks_which_may_end_well(number: signal.Signals, run: Any, tmp_path: Path) -> None:
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
time.sleep(600)
sys.exit(1)
"""

    def ask() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    before = signal.getsignal(number)
    assert run(2, code) == 0
    assert signal.getsignal(number) is before


def test_a_signal_while_ranks_start_reaches_all_of_them(
    run: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin, started = launch._start, []

    def interrupted(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        started.append(begin(argv, env))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(launch, "_start", interrupted)
    start = time.monotonic()
    assert run(3, "time.sleep(600)") == 1
    assert time.monotonic() - start < launch.GRACE_S
    assert capfd.readouterr().err.strip() == "interrupted"


def test_two_signals_at_once_are_one_wish(run: Any, tmp_path: Path) -> None:
    # timeout(1) signals a process and its group; a rank takes a second signal for impatience.
    code = f"""
count = []
signal.signal(signal.SIGTERM, lambda *_: count.append(1))
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
until = time.monotonic() + 60
while not count and time.monotonic() < until:
    time.sleep(0.02)
time.sleep(0.3)
sys.exit(0 if len(count) == 1 else 1)
"""

    ask_twice(tmp_path, 0.1)
    assert run(1, code) == 0


def test_of_a_failing_job_the_rank_that_knows_the_reason_speaks(run: Any, tmp_path: Path) -> None:
    # Rank 1 knows why; rank 0 meets the consequences first.
    code = f"""
import torch.distributed
from mm.ranks import launch
from mm.ranks import stop
from mm.errors import DataError
here = {str(tmp_path)!r} + "/here"
os.makedirs(here, exist_ok=True)
open(here + f"/{{rank}}", "w").close()
while len(os.listdir(here)) < 3:  # what follows is a race: it starts when all have imported
    time.sleep(0.01)
time.sleep(0.1 * rank)
error = DataError("bad shard") if rank == 1 else RuntimeError("connection closed by peer")
if launch.reports(error):
    open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(error))
"""
    assert run(3, code) == 0
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.is_file()] == [("1", "bad shard")]


def test_outside_a_job_every_process_speaks() -> None:
    assert launch.reports(ValueError("x"))


@pytest.mark.parametrize(
    ("wanted", "local_rank", "local_ranks", "devices", "device"),
    [
        ("auto", 1, 4, 0, "cpu"),
        ("auto", 1, 4, 4, "cuda:1"),
        ("auto", 1, 4, 1, "cpu"),  # NCCL cannot share a device between ranks
        ("auto", 0, 1, 1, "cuda:0"),
        ("cpu", 0, 1, 8, "cpu"),
        ("cuda", 2, 4, 8, "cuda:2"),
    ],
)
def test_a_rank_has_a_device_of_its_own(
    wanted: str, local_rank: int, local_ranks: int, devices: int, device: str
) -> None:
    assert launch.choose_device(wanted, local_rank, local_ranks, devices) == device


@pytest.mark.parametrize(
    ("devices", "words"),
    [(0, "found 0; nearest: run.device=cpu"), (1, "found 1; nearest: --nproc 1 or run.device=cpu")],
)
def test_too_few_devices_are_refused_in_words(devices: int, words: str) -> None:
    with pytest.raises(Refused, match=r"run\.device=cuda with 4 ranks on this machine needs 4") as caught:
        launch.choose_device("cuda", 0, 4, devices)
    assert words in str(caught.value)


def test_requests_while_a_rank_starts_wait_until_it_can_end_well(tmp_path: Path, processes: None) -> None:
    # As launch_local starts it; another process signals it before it listens, more than once.
    code = f"""
import os, signal, sys, time
open({str(tmp_path)!r} + "/here", "w").close()
time.sleep(0.3)
from mm.ranks.stop import Stop, unblock_requests
with Stop(rank=True) as stop:
    unblock_requests()
    asked = stop.requested
    os.kill(os.getpid(), signal.SIGTERM)  # the same request, from elsewhere
os.kill(os.getpid(), signal.SIGTERM)  # after its end
sys.exit(0 if asked else 1)
"""
    with block_requests():
        rank = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "here").exists():
        time.sleep(0.02)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        rank.send_signal(number)
    assert rank.wait(60) == 0


def test_a_later_request_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "AGAIN_S", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    with stop.Stop(rank=False) as stopping:
        assert not stopping.requested
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)  # what else comes of the second is no third
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_before_the_ranks_starts_none(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with stop.Stop(rank=False) as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert launch.launch_local(2, ["sys.exit(3)"], stop=stopping) == 0
    assert capfd.readouterr().out.strip() == "stopped by a signal before the first step"


def test_ranks_that_a_second_request_does_not_end_are_ended(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stop, "AGAIN_S", 0.1)
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: None)
open({str(tmp_path)!r} + f"/{{rank}}", "w").close()
while True:
    time.sleep(600)
"""

    ask_twice(tmp_path, 0.3)
    assert run(1, code) == 1


def test_the_code_of_a_job_is_that_of_what_was_told() -> None:
    """A plug-in may end its rank with any code; what the others tell of it is no error of data."""
    told = Failure("rank 1 ended without a word", 1, 1, 0)
    assert launch.exit_code({1: 3, 0: 1}, 2, told) == 1
    assert launch.exit_code({1: 3, 0: 1}, 2, None) == 3 == launch.exit_code({0: 1, 1: 3}, 2, None)
    assert launch.exit_code({1: 4, 0: 4}, 2, Failure("no room", 1, 4, 1)) == 4
    assert launch.exit_code({0: 0, 1: 0}, 2, told) == 0 == launch.exit_code({0: 0, 1: 0}, 2, None)
    assert launch.exit_code({0: 0}, 2, None) == 1 == launch.exit_code({0: -9, 1: 0}, 2, None)
