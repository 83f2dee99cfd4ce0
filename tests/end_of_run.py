"""Many tiny runs to their very end, on demand: does every rank leave with exit code 0?

    python -m tests.end_of_run [RUNS]      # 200 runs of 2 ranks, 2 steps, a checkpoint a step

A thread of a gloo group that lets go of a tensor while the interpreter ends is stopped there, and the process
with it, by SIGABRT ("terminate called without an active exception"). On a busy machine that happens to a few
runs in a hundred, so each rank looks for such threads itself as well.

A run is the real one, from the command line to the end of the interpreter. Its ranks are forked from a
process that has imported everything, because importing torch takes longer than such a run.
A failure is told with what the rank said and how it ended. Exit code 1 where there was one.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.mm.harness import small
from tests.mm.shards import sensor_samples, write_shard

STEPS = 2
LIMIT_S = 300.0  # of one run


def config(folder: Path) -> Path:
    """A sensor and a language model of two layers, a checkpoint a step."""
    write_shard(folder / "sensor-000000.tar", sensor_samples(12))
    raw = small(
        data={"train": ["sensor-*.tar"]},
        run={"dir": str(folder / "run")},
        train={"steps": STEPS, "global_batch": 4},
        checkpoint={"every": 1, "resume": "none", "keep": 1},
        layout={"llm": {"tp": 2}},
    )
    raw["model"] = {
        "sensor": {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}},
        "llm": {**raw["model"]["llm"], "pattern": "M*"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def fork_rank(rank: int, world: int, run: int, port: int, path: Path, said: Path) -> int:
    """The process id of a rank, which leaves as `python -m mm` does: through the interpreter's end."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(run),  # words of its own in the one store
        "OMP_NUM_THREADS": "1",
    }
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(out, fd)
    faulthandler.enable()
    if Path("/proc/self/task").exists():
        atexit.register(tell_of_threads)
    sys.argv = ["mm", "train", str(path)]
    runpy.run_module("mm", run_name="__main__")
    raise AssertionError("a command ends its process")


def tell_of_threads() -> None:
    """At the end of the interpreter: end with an error where a group's threads are still there."""
    left = [t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text().startswith("pt_gloo")]
    if left:
        print(f"{len(left)} threads of groups are left", flush=True)
        os._exit(9)


def host_store(port_file: Path) -> int:
    """The process id of one that serves the store of all runs, as a launcher does."""
    pid = os.fork()
    if pid:
        while not (port_file.exists() and port_file.read_text()):
            time.sleep(0.01)
        return pid
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port_file.write_text(str(store.port))
    while True:
        time.sleep(60)


def run_once(run: int, port: int, path: Path, folder: Path, world: int = 2) -> list[str]:
    """What went wrong in one run, a line a rank."""
    ranks = {fork_rank(r, world, run, port, path, folder / f"said-{r}"): r for r in range(world)}
    deadline, wrong = time.monotonic() + LIMIT_S, []
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            r = ranks.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                wrong.append(f"run {run}, rank {r}: {how}\n{(folder / f'said-{r}').read_text()[-4000:]}")
        elif time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return [*wrong, f"run {run}: ranks {sorted(ranks.values())} did not end"]
        else:
            time.sleep(0.01)
    return wrong


def main() -> int:
    """Run them all; returns the exit code."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for name in ("examples.sensor_encoder", "mm.cli", "mm.commands.preflight", "mm.train.trainer"):
        importlib.import_module(name)

    parent, failed = os.getpid(), 0
    folder = Path(tempfile.mkdtemp(prefix="polyrank-end-"))
    path = config(folder)
    server = host_store(folder / "port")
    port = int((folder / "port").read_text())
    try:
        for run in range(runs):
            wrong = run_once(run, port, path, folder)
            failed += bool(wrong)
            for text in wrong:
                print(text, flush=True)
            if (run + 1) % 10 == 0:
                print(f"{run + 1} runs, {failed} failed", flush=True)
    finally:
        if os.getpid() == parent:  # a rank leaves through here too
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
