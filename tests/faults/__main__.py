"""Random faults at random moments in tiny real jobs that resume until they are done.

    python -m tests.faults [--seed S] [--faults N | --each] [--kinds kill,..] [--steps N] [--json OUT]

Each start of a job gets one fault, at a random moment some steps on, or in the midst of a save. Then every
process must end by itself in time, one message must name the rank that went first, and the next start must
resume. A job that is done must have learned what an undisturbed one learns, bit for bit. Prints a table; exit
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.faults.forge import TIMEOUT_S, Job, config, metrics, weights

KINDS = ("kill", "mid-save", "stop", "never_returns", "keeps_the_interpreter", "raises", "launcher", "term")
AT_ONCE = {"kill", "mid-save", "raises", "launcher", "term"}  # nobody needs to wait for a time-out
END_S = 10.0  # within which everything ends, after run.timeout_s where that is waited for
EVERY = 4  # steps between checkpoints (forge.config)
# Steps that a fault may cost: a checkpoint is written behind the steps, and is done before the next begins.
LOST = 2 * EVERY
STEPS_ON = 9  # a fault comes at most so many steps after a start


@dataclass
class Injected:
    """One fault and what came of it. wrong: what fell short."""

    kind: str
    rank: int
    step: int
    seconds: float = 0.0
    lost: int = 0  # steps that are done again
    wrong: list[str] = field(default_factory=list)
    said: str = ""


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
    limit = END_S if found.kind in AT_ONCE else TIMEOUT_S + END_S
    code, found.seconds = job.end(limit + 20.0)
    said = job.err.read_text()
    done = "held-out" in job.out.read_text() or job.steps() >= job.last
    if code is None:
        found.wrong.append("processes are left")
    elif found.seconds > limit:
        found.wrong.append(f"took longer than {limit:g} s")
    if found.kind in ("term", "launcher"):
        expected = 0 if found.kind == "term" else -signal.SIGKILL
        if code != expected:
            found.wrong.append(f"exit code {code}, not {expected}")
    elif not done:
        if code != 1:
            found.wrong.append(f"exit code {code}, not 1")
        found.wrong += named(said, found)
    kept = [int(p.name[5:]) for p in (job.folder / "run").glob("step-*") if p.suffix == ""]
    found.lost = job.steps() - max(kept, default=0)
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


def run(folder: Path, kinds: Sequence[str], steps: int, draw: random.Random) -> list[Injected]:
    """One job after the other, each of so many steps, until there has been a fault of each of `kinds`."""
    expected, weighed = undisturbed(folder / "undisturbed", steps)
    out: list[Injected] = []
    left, jobs = list(kinds), 0
    while left:
        jobs += 1
        path = config(folder / f"job-{jobs}", steps)
        while True:
            job = Job(path, steps)
            found = inject(job, left[0], draw) if left else None
            if found is None:
                code, _ = job.end(300.0)
                break
            follow(job, found)
            out.append(found)
            left.pop(0)
            print(line(found), flush=True)
        found = out[-1] if out else Injected("none", 0, 0)
        losses = {step: record["loss"] for step, record in metrics(path.parent).items()}
        if code != 0:
            found.wrong.append(f"the last start ended with {code}")
            found.said += job.err.read_text()
        elif losses != expected:
            found.wrong.append("losses differ from the undisturbed run's")
        elif weights(path.parent, steps) != weighed:
            found.wrong.append("weights differ from the undisturbed run's")
    return out


def undisturbed(folder: Path, steps: int) -> tuple[dict[int, float], dict[str, str]]:
    """Losses by step and weights of a run without faults."""
    path = config(folder, steps)
    job = Job(path, steps)
    code, _ = job.end(300.0)
    assert code == 0, job.err.read_text()
    return {step: record["loss"] for step, record in metrics(folder).items()}, weights(folder, steps)


def line(found: Injected) -> str:
    ended = f"{found.seconds:5.1f} s, {found.lost} steps again"
    return f"{found.kind:<22} rank {found.rank}  step {found.step:>4}  {ended}  {'; '.join(found.wrong)}"


def table(found: Sequence[Injected]) -> str:
    """By kind: injected, survived, named rightly, seconds to end (median, most), steps done again (most)."""
    rows = ["| fault | injected | as it should be | s to the end, median | most | steps again, most |"]
    rows.append("|---|---|---|---|---|---|")
    for kind in dict.fromkeys(f.kind for f in found):
        some = [f for f in found if f.kind == kind]
        seconds = sorted(f.seconds for f in some)
        good = sum(not f.wrong for f in some)
        rows.append(
            f"| {kind} | {len(some)} | {good} | {seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} | "
            f"{max(f.lost for f in some)} |"
        )
    return "\n".join(rows)


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
    start = time.monotonic()
    chosen = kinds if args.each else [draw.choice(kinds) for _ in range(args.faults)]
    found = run(folder, chosen, args.steps, draw)
    print(table(found))
    print(f"{len(found)} faults in {time.monotonic() - start:.0f} s, seed {seed}")
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in found], indent=1))
    bad = [f for f in found if f.wrong]
    for f in bad:
        print(f"\n{line(f)}\n{f.said[-3000:]}")
    if args.keep:
        print(folder)
    else:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
