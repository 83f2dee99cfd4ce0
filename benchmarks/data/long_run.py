"""Memory and open files over many steps of the feed alone: planner, workers and bad samples included.

    python -m benchmarks.data.long_run [--steps 10000] [--workers 2] [--batch 4] [--pack TOKENS]

Tiny pictures, a job of one rank. Every tenth of the run a line: resident memory of the rank, its planner and
its workers, MiB, and their open files. Ends with exit code 1 where the last half has grown by more than 1 MiB
a process, or by a file.
Shared memory counts with each process that has used it. Garbage is collected as in training: without that,
step plans, which are cycles, lie there until a quarter more objects exist than torch has.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.data.made import config, feeding, jpegs, write_tars
from mm.ranks.feed import Feed
from mm.train.garbage import set_aside

MOST_MIB = 1.0  # that a process may grow in the last half


def used(pid: int) -> tuple[float, int]:
    """Resident memory of a process, MiB, and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def processes(feed: Feed) -> dict[str, int]:
    """The processes of a feed by name."""
    assert feed._planner is not None and feed._workers is not None
    workers = {f"worker {n}": pid for n, pid in enumerate(feed._workers.pids)}
    return {"rank": os.getpid(), "planner": feed._planner.pid, **workers}


def main() -> None:
    args = common.parser(__doc__)
    args.add_argument("--steps", type=int, default=10_000)
    args.add_argument("--workers", type=int, default=2)
    args.add_argument("--batch", type=int, default=4)
    args.add_argument("--pack", type=int)
    asked = args.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="long-run-"))
    seen: list[dict[str, tuple[float, int]]] = []
    try:
        write_tars(root, list(jpegs(500, 32)), shards=4)
        begin = time.perf_counter()
        options = {"workers": asked.workers, **({"pack": asked.pack} if asked.pack else {})}
        with feeding(config(root, 32, asked.batch, **options)) as feed, set_aside():
            for step in range(asked.steps):
                feed.next(step, asked.steps)
                if (step + 1) % max(1, asked.steps // 10) == 0:
                    seen.append({name: used(pid) for name, pid in processes(feed).items()})
                    said = "  ".join(
                        f"{name} {mib:.1f} MiB {fds} files" for name, (mib, fds) in seen[-1].items()
                    )
                    print(f"step {step + 1}  {time.perf_counter() - begin:.0f} s  {said}", flush=True)
    finally:
        shutil.rmtree(root)
    middle, end = seen[len(seen) // 2 - 1], seen[-1]
    grown = {name: end[name][0] - middle[name][0] for name in end}
    print("grown in the last half, MiB: " + ", ".join(f"{name} {mib:+.2f}" for name, mib in grown.items()))
    if max(grown.values()) > MOST_MIB or any(end[n][1] > middle[n][1] for n in end):
        sys.exit(1)


if __name__ == "__main__":
    main()
