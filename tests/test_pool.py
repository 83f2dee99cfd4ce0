"""The worker pool itself: fresh groups, failures that name their rank, and recovery from hangs."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import pool as room
from tests.pool import Pool, RankFailed


def place() -> tuple[int, int, float]:
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"deliberate on {rank}")
    dist.barrier()  # would wait for the failed rank for ever


def sleep_on(rank: int) -> int:
    if dist.get_rank() == rank:
        time.sleep(600)
    return dist.get_rank()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def unsendable() -> Any:
    return lambda: None


def pid() -> int:
    return os.getpid()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_run_has_exactly_its_ranks(n: int, ranks: Any) -> None:
    assert ranks(n, place) == [(r, n, n * (n + 1) / 2) for r in range(n)]


def test_workers_are_reused_and_cheap(ranks: Any) -> None:
    first = ranks(4, pid)
    start = time.monotonic()
    assert ranks(4, pid) == first
    assert time.monotonic() - start < 5.0  # well under a second where the machine is not busy


def test_a_failure_names_its_rank_and_shows_its_traceback(ranks: Any) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1:.*fail_on.*ValueError: deliberate on 1"):
        ranks(2, fail_on, 1, timeout=20)
    assert len(ranks(2, place)) == 2


def test_a_hang_names_its_rank_and_shows_its_stack(ranks: Any) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 gave no answer \(limit 1 s\).*sleep_on"):
        ranks(2, sleep_on, 1, timeout=1)
    assert len(ranks(2, place)) == 2


def test_a_killed_rank_is_named_and_replaced(ranks: Any) -> None:
    with pytest.raises(RankFailed, match="rank 0 died: signal SIGKILL"):
        ranks(2, die_on, 0, timeout=20)
    assert len(ranks(2, place)) == 2


def test_a_result_that_cannot_be_pickled_is_a_failure_not_a_hang(ranks: Any) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0:.*cannot be sent back"):
        ranks(1, unsendable)


@pytest.mark.slow
def test_workers_that_start_too_late_answer_no_later_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pool()
    try:
        monkeypatch.setattr(room, "START_S", 0.0)
        with pytest.raises(RankFailed, match="did not start within 0 s"):
            own.run(2, place)
        monkeypatch.undo()
        assert own.run(2, place) == [(r, 2, 3.0) for r in range(2)]
    finally:
        own.close()
