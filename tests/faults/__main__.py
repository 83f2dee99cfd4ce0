"""Random faults at random moments in tiny real jobs that resume until they are done.

    python -m tests.faults [--seed S] [--faults N | --each] [--kinds kill,..] [--steps N] [--json OUT]

Each start of a job gets one fault, at a random moment some steps on, or in the midst of a save; scenes
(scenes.py) have jobs of their own, some of them under torchrun on two nodes, and are asked for a moment with
`KIND@MOMENT`. Then every process must end by itself in time, one message must name the rank that went first,
and the next start must resume. A job that is done must have learned what an undisturbed one learns, bit for
bit. Limits of time are multiplied by how many processes there are to run for each core. Prints a table; exit
code 1 where something fell short, with what the job said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.forge import LIMIT_S, Job, config, metrics, timeout_here, timeout_of, weights
from tests.faults.injected import END_S, LOST, Injected, line, table
from tests.faults.scenes import SCENES, in_time, kept, play

PLAIN = ("kill", "mid-save", "stop", "never_returns", "keeps_the_interpreter", "raises", "launcher", "term")
KINDS = (*PLAIN, *SCENES)
AT_ONCE = {"kill", "mid-save", "raises", "launcher", "term"}  # nobody needs to wait for a time-out
ROUNDING = 1e-9  # of losses in float64, on another layout
STEPS_ON = 9  # a fault comes at most so many steps after a start


def inject(job: Job, kind: str, draw: random.Random) -> Injected | None:
    """Put a fault into a job that runs; None where the job was done before."""
    rank = draw.randrange(2)
    if not job.wait_for(job.began_at + draw.randrange(1, STEPS_ON)):
        return None
    if kind == "mid-save":
        while not list((job.folder / "run").glob("step-*.tmp")):
            if job.launcher.poll() is not None:
                return None
            time.sleep(0.0005)
    else:
        time.sleep(draw.random() * 0.1)
    found = Injected(kind, rank, job.steps() + 1)
    if job.launcher.poll() is not None:
        return None
    if kind in ("kill", "mid-save", "stop"):
        number = signal.SIGSTOP if kind == "stop" else signal.SIGKILL
        os.kill(job.ranks[rank], number)
    elif kind == "launcher":
        job.launcher.kill()
    elif kind == "term":
        job.launcher.send_signal(signal.SIGTERM)
    else:
        job.ask(rank, kind)
    return found


def follow(job: Job, found: Injected) -> None:
    """See how a job ends after a fault."""
    waits = 0.0 if found.kind in AT_ONCE else timeout_of(job.folder)
    code, found.seconds = job.end(waits + END_S + 60.0)
    said = job.err.read_text()
    done = "held-out" in job.out.read_text() or job.steps() >= job.last
    if code is None:
        found.wrong.append("processes are left")
    found.wrong += in_time(job.crowd, found.seconds, waits)
    if found.kind in ("term", "launcher"):
        expected = 0 if found.kind == "term" else -signal.SIGKILL
        if code != expected:
            found.wrong.append(f"exit code {code}, not {expected}")
    elif not done:
        if code != 1:
            found.wrong.append(f"exit code {code}, not 1")
        found.wrong += named(said, found)
    found.lost = job.steps() - kept(job.folder)
    if found.lost > LOST:
        found.wrong.append(f"{found.lost} steps are lost")
    (job.folder / "ask").unlink(missing_ok=True)
    if found.wrong:
        found.said = said


def named(said: str, found: Injected) -> list[str]:
    """What is wrong with a message: it must be one, and name the rank and, where it can, the action."""
    lines = [line for line in said.splitlines() if line.startswith("rank ")]
    wrong = [] if len(lines) == 1 else [f"{len(lines)} messages"]
    if not any(line.startswith(f"rank {found.rank}") for line in lines):
        wrong.append("another rank is named, or none")
    if found.kind in ("never_returns", "keeps_the_interpreter", "raises") and not any(
        "sensor, forward of micro-batch 0 in step" in line for line in lines
    ):
        wrong.append("the action is not named")
    return wrong


class Suite:
    """Jobs of so many steps in a folder, with faults. total: of the faults that are to come."""

    def __init__(self, folder: Path, steps: int, draw: random.Random, total: int) -> None:
        self.folder, self.steps, self.draw, self.total = folder, steps, draw, total
        self.began, self.timeout_s = time.monotonic(), timeout_here()
        self.expected, self.weighed = undisturbed(folder / "undisturbed", steps)
        self.found: list[Injected] = []
        self.jobs = 0

    def run(self, kinds: Sequence[str]) -> None:
        """Inject a fault of each of `kinds`: first those of plain jobs, one job after the other."""
        left = [kind for kind in kinds if kind in PLAIN]
        while left:
            left = self._job(left)
        for kind in kinds:
            if kind not in PLAIN:
                self._scene(kind)

    def _config(self) -> Path:
        self.jobs += 1
        return config(self.folder / f"job-{self.jobs}", self.steps, self.timeout_s)

    def _job(self, left: Sequence[str]) -> Sequence[str]:
        """A job to its end, with as many of the faults as come before it; returns the others."""
        path = self._config()
        while True:
            job = Job(path, self.steps)
            found = inject(job, left[0], self.draw) if left else None
            if found is None:
                code, _ = job.end(LIMIT_S)
                break
            follow(job, found)
            left = left[1:]
            self._add(found)
        found = self.found[-1] if self.found else Injected("none", 0, 0)
        if code != 0:
            found.wrong.append(f"the last start ended with {code}")
            found.said += job.err.read_text()
        else:
            self._compare(path, found)
        return left

    def _scene(self, kind: str) -> None:
        path = self._config()
        try:
            found = play(kind, path, self.steps, self.draw)
            if not any("the last start" in why for why in found.wrong):
                self._compare(path, found, exact=SCENES[kind.partition("@")[0]].exact)
        except Exception as error:  # what else is to be tried does not depend on it
            found = Injected(kind, -1, 0, wrong=[f"{error!r:.60}"], said=traceback.format_exc())
        self._add(found)
        shutil.rmtree(path.parent, ignore_errors=True)

    def _compare(self, path: Path, found: Injected, *, exact: bool = True) -> None:
        losses = {step: record["loss"] for step, record in metrics(path.parent).items()}
        if losses.keys() != self.expected.keys():
            found.wrong.append("metrics lack steps, or have others")
        elif exact and losses != self.expected:
            found.wrong.append("losses differ from the undisturbed run's")
        elif exact and weights(path.parent, self.steps) != self.weighed:
            found.wrong.append("weights differ from the undisturbed run's")
        elif any(abs(losses[s] - loss) > ROUNDING * abs(loss) for s, loss in self.expected.items()):
            found.wrong.append("losses differ from the undisturbed run's by more than rounding")

    def _add(self, found: Injected) -> None:
        self.found.append(found)
        done, spent = len(self.found), time.monotonic() - self.began
        bad = sum(bool(f.wrong) for f in self.found)
        more = spent / done * (self.total - done)
        print(line(found), flush=True)
        print(
            f"  {done} of {self.total}, {bad} not as it should be, {spent:.0f} s, about {more:.0f} s more",
            flush=True,
        )


def undisturbed(folder: Path, steps: int) -> tuple[dict[int, float], dict[str, str]]:
    """Losses by step and weights of a run without faults."""
    path = config(folder, steps, 600.0)  # nothing is to go wrong
    job = Job(path, steps)
    code, _ = job.end(1000.0 + steps)
    assert code == 0, job.err.read_text()
    return {step: record["loss"] for step, record in metrics(folder).items()}, weights(folder, steps)


def shuffled(kinds: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """So many faults in random order, of each kind as many as of any other, or one less."""
    rounds = [draw.sample(kinds, len(kinds)) for _ in range(-(-count // max(1, len(kinds))))]
    return [kind for one in rounds for kind in one][:count]


def main(argv: Sequence[str]) -> int:
    """Run a suite; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--each", action="store_true", help="one fault of each kind, in their order")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    args = parser.parse_args(argv)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    for name in ("tests.faults.plugins", "mm.cli", "mm.commands.preflight", "mm.train.trainer"):
        importlib.import_module(name)
    draw = random.Random(seed)
    kinds = args.kinds.split(",")
    folder = Path(tempfile.mkdtemp(prefix="polyrank-faults-"))
    for kind in list(kinds):
        why = SCENES[kind.partition("@")[0]].missing() if kind not in PLAIN else ""
        if why:
            kinds.remove(kind)
            print(f"{kind} is not tried: {why}")
    chosen = kinds if args.each else shuffled(kinds, args.faults, draw)
    suite = Suite(folder, args.steps, draw, len(chosen))
    print(f"run.timeout_s is {suite.timeout_s:g} s", flush=True)
    suite.run(chosen)
    found = suite.found
    print(table(found))
    bad = [f for f in found if f.wrong]
    print(
        f"{len(found)} faults of {len(set(chosen))} kinds, {len(bad)} not as it should be, "
        f"{time.monotonic() - suite.began:.0f} s, {args.steps} steps a job, seed {seed}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in found], indent=1))
    for f in bad:
        print(f"\n{line(f)}\n{f.said[-3000:]}")
    if args.keep:
        print(folder)
    else:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
