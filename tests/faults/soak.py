"""A long tiny run with a fault now and then: does it end with the weights of an undisturbed one?

    python -m tests.faults.soak [--steps 5000] [--every SECONDS] [--seed S] [--kinds kill,stop,..] [--pause S]

Faults come at random moments, SECONDS apart on average (30). Steps are fast: --pause makes time for more
faults; the undisturbed run goes without it. Memory, threads and file handles of the ranks are looked at once
a second; their growth is that between the first and the last quarter of the longest start.
Exit code 1 where weights or losses differ, where a fault was not survived as it should be, or where threads
or handles grow.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.faults.__main__ import PLAIN, follow, inject, undisturbed
from tests.faults.forge import Job, config, metrics, timeout_here, weights
from tests.faults.injected import Injected, line, table

MOST_GROWTH_MIB = 40.0  # of a rank's memory, over its longest start


class Use(NamedTuple):
    """What a rank uses."""

    mib: float
    threads: int
    handles: int


def use_of(pid: int) -> Use | None:
    """What a process uses now; None where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(row.split(":", 1) for row in status.splitlines() if ":" in row)
        handles = len(os.listdir(f"/proc/{pid}/fd"))
        return Use(int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]), handles)
    except (OSError, KeyError):
        return None


def watch(job: Job, seconds: float) -> list[Use]:
    """What the ranks use, one look a second, until a job ends or so many seconds have passed."""
    seen, deadline = [], time.monotonic() + seconds
    if not job.wait_for(job.began_at + 1):
        return []
    while time.monotonic() < deadline and job.launcher.poll() is None:
        seen += [use for pid in job.ranks if (use := use_of(pid)) is not None]
        time.sleep(1.0)
    return seen


def growth(seen: Sequence[Use]) -> Use:
    """How much more the last quarter of a start uses than the first."""
    n = max(1, len(seen) // 4)
    first, last = seen[:n], seen[-n:]
    return Use(*(median(u[i] for u in last) - median(u[i] for u in first) for i in range(3)))


def progress(steps: int, last: int, seconds: float, found: Sequence[Injected]) -> str:
    """How far a soak is, and how long it will take as it goes."""
    bad, more = sum(bool(f.wrong) for f in found), seconds / max(1, steps) * (last - steps)
    return (
        f"  step {steps} of {last}, {len(found)} faults, {bad} not as it should be, {seconds:.0f} s, about "
        f"{more:.0f} s more"
    )


def main(argv: Sequence[str]) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step takes longer")
    parser.add_argument("--kinds", default=",".join(PLAIN))
    args = parser.parse_args(argv)
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    for name in ("tests.faults.plugins", "mm.cli", "mm.commands.preflight", "mm.train.trainer"):
        importlib.import_module(name)
    draw, kinds = random.Random(seed), args.kinds.split(",")
    folder = Path(tempfile.mkdtemp(prefix="polyrank-soak-"))
    begun = time.monotonic()
    expected, weighed = undisturbed(folder / "undisturbed", args.steps)
    print(f"the undisturbed run: {args.steps} steps in {time.monotonic() - begun:.0f} s", flush=True)
    begun = time.monotonic()
    path = config(folder / "job", args.steps, timeout_here())
    if args.pause:
        path.with_name("pause").write_text(str(args.pause))
    found: list[Injected] = []
    longest: list[Use] = []
    while True:
        job = Job(path, args.steps)
        seen = watch(job, draw.expovariate(1 / args.every))
        longest = max(longest, seen, key=len)
        fault = inject(job, draw.choice(kinds), draw)
        if fault is None:
            code, _ = job.end(300.0)
            break
        follow(job, fault)
        found.append(fault)
        print(line(fault), flush=True)
        print(progress(job.steps(), args.steps, time.monotonic() - begun, found), flush=True)
    more = growth(longest) if longest else Use(0.0, 0, 0)
    wrong = [line(f) for f in found if f.wrong]
    losses = {step: record["loss"] for step, record in metrics(path.parent).items()}
    if code != 0:
        wrong.append(f"the last start ended with {code}:\n{job.err.read_text()}")
    elif losses != expected or weights(path.parent, args.steps) != weighed:
        wrong.append("losses or weights differ from the undisturbed run's")
    if more.threads > 0 or more.handles > 0 or more.mib > MOST_GROWTH_MIB:
        wrong.append("ranks grow")
    print(
        f"{table(found) if found else 'no fault came'}\n{args.steps} steps, {len(found)} faults, "
        f"{sum(bool(f.wrong) for f in found)} not as it should be, {time.monotonic() - begun:.0f} s, "
        f"seed {seed}"
    )
    print(
        f"growth over the longest start ({len(longest) // 2} s): {more.mib:.1f} MiB, "
        f"{more.threads:g} threads, {more.handles:g} handles"
    )
    print("\n".join(wrong) or "weights and losses are the undisturbed run's, bit for bit")
    shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
