"""Jobs as the command line starts them, launcher and ranks, forked from a process that has torch.

Importing torch takes longer than a tiny job, so a suite of many starts forks. The launcher is the real one;
only the way in which it starts a rank is another.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mm.ranks import launch
from mm.ranks.stop import block_requests
from tests.mm.harness import small
from tests.mm.shards import sensor_samples, write_shard

TIMEOUT_S = 6.0  # run.timeout_s of the jobs, on a machine that has a core for each
MOST_TIMES = 10.0  # as long, where many processes share them
LIMIT_S = 300.0  # of one start, on a very busy machine


def config(folder: Path, steps: int, timeout_s: float = TIMEOUT_S) -> Path:
    """Text and a faulty sensor on two ranks, a checkpoint every 4 steps."""
    folder.mkdir(parents=True)
    write_shard(folder / "sensor-000000.tar", sensor_samples(20))
    raw = small(
        data={"train": ["sensor-*.tar"]},
        run={"dir": str(folder / "run"), "nproc": 2, "timeout_s": timeout_s},
        train={"steps": steps, "global_batch": 4},
        checkpoint={"every": 4, "keep": 2},
    )
    options = {"asks": str(folder / "ask")}
    raw["model"] = {
        "sensor": {
            "encoder": "tests.faults.plugins:FaultyEncoder",
            "projector": {"hidden": 24},
            "options": options,
        },
        "llm": {**raw["model"]["llm"], "pattern": "M*"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


class Crowd:
    """How busy the machine is while something goes on: limits are those of a machine that is not."""

    def __init__(self) -> None:
        self.looks, self.running = 0, 0.0

    def look(self) -> None:
        """Count the processes that run or could run now."""
        with contextlib.suppress(OSError, ValueError):
            self.running += int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
            self.looks += 1

    def factor(self) -> float:
        """How many of them there were for each core, at least 1."""
        return max(1.0, self.running / max(1, self.looks) / (os.cpu_count() or 1))


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where it has ended."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def timeout_here() -> float:
    """run.timeout_s for jobs on this machine as busy as it is now, seconds. Takes a second."""
    crowd = Crowd()
    for _ in range(50):
        crowd.look()
        time.sleep(0.02)
    return round(TIMEOUT_S * min(crowd.factor(), MOST_TIMES), 1)


def timeout_of(folder: Path) -> float:
    """run.timeout_s of a job."""
    return float(yaml.safe_load((folder / "config.yaml").read_text())["run"]["timeout_s"])


class Forked:
    """A forked process with the part of Popen that the launcher uses."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_rank(argv: Sequence[str], env: Mapping[str, str]) -> Forked:
    """As mm.ranks.launch._start."""
    with block_requests():
        pid = os.fork()
        if not pid:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):  # those of the launcher are not a rank's
                signal.signal(number, signal.SIG_DFL)
            _be_mm(argv, {**env, "OMP_NUM_THREADS": "1"})
    return Forked(pid)


def _be_mm(argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    os.environ.update(env)
    sys.argv = ["mm", *argv]
    code = 1
    try:
        runpy.run_module("mm", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Job:
    """A start of a job: a launcher and its ranks. last: its last step. Files `out` and `err` have what they
    say."""

    def __init__(self, path: Path, last: int) -> None:
        self.folder, self.last = path.parent, last
        self.out, self.err = self.folder / "out", self.folder / "err"
        self.began_at = self.steps()
        pid = os.fork()
        if not pid:
            for stream, file in ((1, self.out), (2, self.err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
            launch._start = fork_rank  # type: ignore[assignment]  # in this process alone
            _be_mm(["train", str(path)], {})
        self.launcher = Forked(pid)
        self.ranks: list[int] = []
        self.crowd = Crowd()

    def steps(self) -> int:
        """The last step that the run's metrics have; 0 without."""
        found = metrics(self.folder)
        return max(found, default=0)

    def wait_for(self, steps: int) -> bool:
        """Wait until so many steps are done and the ranks are known; False where the job ends before."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and self.launcher.poll() is None:
            self.ranks = children(self.launcher.pid)
            text = self.out.read_text() if self.out.exists() else ""
            if len(self.ranks) == 2 and "all 2 ranks have started" in text and self.steps() >= steps:
                return True
            time.sleep(0.005)
        return False

    def wait_until(self, what: Callable[[], bool]) -> bool:
        """Wait until what() holds; False where the job ends before."""
        while not (held := what()) and self.launcher.poll() is None:
            time.sleep(0.0005)
        return held

    def reads(self) -> bool:
        """Whether some rank has a file of a checkpoint open."""
        for pid in self.ranks:
            with contextlib.suppress(OSError):
                for entry in os.scandir(f"/proc/{pid}/fd"):
                    if "/run/step-" in os.readlink(entry.path):
                        return True
        return False

    def said(self) -> str:
        """What the job has said, errors first."""
        return "\n".join(f.read_text() if f.exists() else "" for f in (self.err, self.out))

    def ask(self, rank: int, does: str) -> None:
        """Ask the encoder on a rank for a fault, in its next forward."""
        partial = self.folder / "ask.tmp"
        partial.write_text(json.dumps({"rank": rank, "does": does}))
        os.replace(partial, self.folder / "ask")

    def end(self, limit_s: float) -> tuple[int | None, float]:
        """The exit code, None where something is left after limit_s and is killed; and how long that took."""
        start = time.monotonic()
        left = [self.launcher.pid, *self.ranks]
        while left and time.monotonic() < start + limit_s:
            self.launcher.poll()
            left = [p for p in left if _lives(p)]
            self.crowd.look()
            time.sleep(0.01)
        took = time.monotonic() - start
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        while self.launcher.poll() is None:
            time.sleep(0.01)
        return (None if left else self.launcher.returncode), took


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """By step, the metrics that a run has written whole."""
    file = folder / "run" / "metrics.jsonl"
    out = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        out[record["step"]] = record
    return out


def weights(folder: Path, step: int) -> dict[str, str]:
    """The tensors' files of a checkpoint, by name, as their checksums."""
    manifest = json.loads((folder / "run" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".distcp")}
