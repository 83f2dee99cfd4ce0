"""The clock on the wall may jump, by an hour or by years: no wait, no order and no retention asks it."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from mm.checkpoint.remote.index import RemoteIndex

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("mm/checkpoint", "mm/train", "mm/ranks", "mm/faults", "parallel/checkpoint")
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"}
STAMPS = {"st_mtime", "st_mtime_ns", "st_ctime", "st_ctime_ns", "getmtime"}
# Names of an index follow each other whatever the clock says; a claim is looked at for any other stamp.
MAY = {"mm/checkpoint/remote/index.py": {"time.time"}, "mm/ranks/claim.py": {"st_mtime_ns"}}


def asked(file: Path) -> set[str]:
    """What of the wall clock, and of the times of files, a source asks."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            name = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else node.attr
            found |= {name} & WALL | {node.attr} & STAMPS
    return found


def test_nothing_that_must_last_asks_the_clock_on_the_wall() -> None:
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    found = {file.relative_to(ROOT).as_posix(): asked(file) for file in files}
    assert {name: what for name, what in found.items() if what} == MAY


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0, -1e9])
def test_an_index_follows_the_one_before_it_over_a_jump(
    jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RemoteIndex("run").next_file
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump_s)
    assert RemoteIndex("run", file=first).next_file > first
