"""`python -m tests.mutations [NAME ...] [--jobs N]`: put each fault into a copy and see its test fail.

NAME: of faults, or how their names begin; all by default. Ends with 0 where every one was caught.
`--table` prints the table of docs/testing.md instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("benchmarks", "configs", "docs", "encoders", "examples", "llm", "mm", "parallel", "tests")
FILES = ("Makefile", "README.md", "pyproject.toml")
LIMIT_S = 600.0
PASSED, FAILED = 0, 1  # what pytest ends with; anything else means that it did not run the test


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(words)
    if given.table:
        print(table())
        return 0
    some = [f for f in FAULTS if not given.name or f.name.startswith(tuple(given.name))]
    if not some:
        parser.error(f"no fault is called {', '.join(given.name)}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polyrank-faults-") as folder:
        caught = run(some, Path(folder), given.jobs)
    print(f"{caught} of {len(some)} caught in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(some) else 1


def run(faults: Sequence[Fault], folder: Path, jobs: int) -> int:
    """How many of `faults` their tests catch; says so of each. jobs: copies that work side by side."""
    copies: queue.Queue[Path] = queue.Queue()
    for k in range(jobs):
        copies.put(copy(folder / str(k)))
    at = copies.get()
    code, said = pytest(at, *dict.fromkeys(f.test for f in faults))
    copies.put(at)
    if code != PASSED:
        print(f"the tests do not pass without a fault:\n{said}")
        return 0

    def one(fault: Fault) -> bool:
        at, start = copies.get(), time.monotonic()
        try:
            code, said = under(fault, at)
        finally:
            copies.put(at)
        outcome = {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"ERROR {code}")
        print(f"{outcome:9} {time.monotonic() - start:5.1f} s  {fault.name:32} {fault.test}", flush=True)
        if code not in (PASSED, FAILED):
            print(said, flush=True)
        return code == FAILED

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, faults))


def copy(to: Path) -> Path:
    """The sources in a folder of their own."""
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    return to


def under(fault: Fault, at: Path) -> tuple[int, str]:
    """What pytest ends with and says in a copy that has the fault; the copy is whole again afterwards."""
    path = at / fault.file
    whole = path.read_text()
    try:
        write(path, fault.applied(whole))
        return pytest(at, fault.test)
    finally:
        write(path, whole)


def write(path: Path, text: str) -> None:
    """Write a module, of which Python may have compiled another version in the same second."""
    path.write_text(text)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def pytest(at: Path, *tests: str) -> tuple[int, str]:
    """(exit code, last words) of these tests in a copy."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=at, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end within {LIMIT_S:.0f} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def table() -> str:
    """The faults in Markdown."""
    rows = ["| fault | where | caught by |", "|---|---|---|"]
    rows += [f"| {f.what} | `{f.file}` | `{f.test.partition('[')[0]}` |" for f in FAULTS]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
