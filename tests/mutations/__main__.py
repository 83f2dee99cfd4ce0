"""`python -m tests.mutations [NAME ...] [--jobs N]`: put each fault into a copy and see its test fail.

NAME: of faults, or how their names begin; all by default. Ends with 0 where every one was caught.
`--table` prints the table of docs/testing.md instead.

Tests run in forks of this process, which has imported what takes long and nothing of the project's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.fault import Fault
from tests.mutations.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("encoders", "examples", "llm", "mm", "parallel", "tests")
COPIED = ("benchmarks", "configs", "docs", *PACKAGES)
FILES = ("Makefile", "README.md", "pyproject.toml")
LIMIT_S = 300
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
    warm_up()
    with tempfile.TemporaryDirectory(prefix="polyrank-faults-") as folder:
        caught = run(some, Path(folder), given.jobs)
    print(f"{caught} of {len(some)} caught in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(some) else 1


def warm_up() -> None:
    """Import what takes long. Names of the project's own packages are forgotten again."""
    # Of a module that changes twice a second Python may take what it compiled before.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    importlib.import_module("tests.llm.oracle")  # transformers, beside whichever torch there is

    torch.set_num_threads(1)
    kept.extend(m for name, m in sys.modules.items() if name.partition(".")[0] in PACKAGES)


kept: list[object] = []  # modules that hold what torch would take back with them


def run(faults: Sequence[Fault], folder: Path, jobs: int) -> int:
    """How many of `faults` their tests catch; says so of each. jobs: copies that work side by side."""
    copies = [copy(folder / str(k)) for k in range(jobs)]
    said = folder / "said"
    _, status = os.waitpid(fork(copies[0], said, *dict.fromkeys(f.test for f in faults)), 0)
    if status != PASSED:
        print(f"the tests do not pass without a fault:\n{said.read_text()[-5000:]}")
        return 0
    left, caught = list(faults), 0
    working: dict[int, tuple[Fault, Path, float]] = {}
    while left or working:
        while left and copies:
            fault, at = left.pop(0), copies.pop()
            path = at / fault.file
            path.write_text(fault.applied(path.read_text()))
            working[fork(at, at / "said", fault.test)] = fault, at, time.monotonic()
        pid, status = os.wait()
        fault, at, start = working.pop(pid)
        shutil.copy(ROOT / fault.file, at / fault.file)
        copies.append(at)
        code = os.waitstatus_to_exitcode(status)
        outcome = {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"ERROR {code}")
        print(f"{outcome:9} {time.monotonic() - start:5.1f} s  {fault.name:32} {fault.test}", flush=True)
        if code not in (PASSED, FAILED):
            print((at / "said").read_text()[-3000:], flush=True)
        caught += code == FAILED
    return caught


def copy(to: Path) -> Path:
    """The sources in a folder of their own."""
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    return to


def fork(at: Path, said: Path, *nodes: str) -> int:
    """The process id of pytest on these tests in a copy; what it says goes to a file."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LIMIT_S)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(at)
    sys.path[0] = str(at)
    for name in [n for n in sys.modules if n.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk"]
    os._exit(int(pytest.main([*options, *nodes])))


def table() -> str:
    """The faults in Markdown."""
    rows = ["| fault | where | caught by |", "|---|---|---|"]
    rows += [f"| {f.what} | `{f.file}` | `{f.test.partition('[')[0]}` |" for f in FAULTS]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
