"""The process that plans: what it plans, how it fails, and that it ends with its rank."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.planning.step import planner, whole
from benchmarks.planning.synthetic import inputs, samples
from mm.errors import DataError, PolyrankError
from mm.plan.table import SampleTable
from mm.ranks.planner import Planned, Planner, PlanStep

MADE = inputs(8, 3)
TABLE = SampleTable.of(samples(24), MADE)
BAD = frozenset[int]()


def ended(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "(zombie)" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def failing(plan: PlanStep) -> Planner:
    return Planner(plan, TABLE, MADE, rank=5)


def test_the_process_plans_what_its_rank_would() -> None:
    order = np.random.default_rng(0).permutation(24)
    one = planner(TABLE, MADE, order, None)
    mine, edges = whole(TABLE, MADE, order, 7, None)
    for _ in range(2):
        found = one.plan(0, BAD)
        assert (found.plan.digest, found.plan.sample_ids) == (mine.digest, mine.sample_ids)
        assert (
            found.plan.inputs is MADE and found.plan.microbatches[1].samples == mine.microbatches[1].samples
        )
        for a, b in zip(found.boundary, edges, strict=True):
            assert str(a.edges) == str(b.edges)
            assert all(np.array_equal(a.positions[m], b.positions[m]) for m in b.positions)
    pid = one.pid
    one.close()
    assert not Path(f"/proc/{pid}").exists()


def test_the_process_knows_which_samples_are_bad() -> None:
    def says(step: int, bad: frozenset[int]) -> Planned:
        raise DataError(f"{step}: {sorted(bad)}")

    one, some, others = failing(says), frozenset({1, 2}), frozenset({3})
    for step, bad in enumerate([some, some, others, some, BAD, BAD, frozenset({1, 2})]):
        with pytest.raises(DataError, match=re.escape(f"{step}: {sorted(bad)}")):
            one.plan(step, bad)
    one.close()


def test_a_failure_is_named() -> None:
    def no_data(step: int, bad: frozenset[int]) -> Planned:
        raise DataError(f"all samples are bad but {sorted(bad)}")

    def fault(step: int, bad: frozenset[int]) -> Planned:
        return Planned(None, [][step])  # type: ignore[arg-type]

    def killed(step: int, bad: frozenset[int]) -> Planned:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    first, second, third = map(failing, (no_data, fault, killed))
    for _ in range(2):  # it goes on after a failure
        with pytest.raises(DataError, match=r"all samples are bad but \[3\]"):
            first.plan(0, frozenset({3}))
    with pytest.raises(PolyrankError, match=r"(?s)step 8: the planner of rank 5 failed:.*IndexError"):
        second.plan(7, BAD)
    with pytest.raises(PolyrankError, match="step 2: the planner process of rank 5 was ended by SIGKILL"):
        third.plan(1, BAD)
    for one in (first, second, third):
        one.close()


def test_it_ends_with_its_rank_and_not_before() -> None:
    def plan(step: int, bad: frozenset[int]) -> Planned:
        raise DataError("there")

    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a rank that ends at once, without a word to its planner
        os.write(write, str(failing(plan).pid).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert ended(int(os.read(read, 20)))
    os.close(read), os.close(write)
    one = failing(plan)
    for number in (signal.SIGTERM, signal.SIGINT):  # to all processes of a job: the rank decides
        with pytest.raises(DataError, match="there"):
            one.plan(0, BAD)
        os.kill(one.pid, number)
    with pytest.raises(DataError, match="there"):
        one.plan(0, BAD)
    one.close()
