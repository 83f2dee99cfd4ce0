"""Who waits for a message: the host for its own, an accelerator's queue for its own."""

from __future__ import annotations

from datetime import timedelta

import torch

from parallel.comm.waiting import wait_for


class Work:
    """Notes how it is waited for."""

    def __init__(self) -> None:
        self.waits: list[tuple[timedelta, ...]] = []

    def wait(self, *timeout: timedelta) -> None:
        self.waits.append(timeout)


def test_a_host_waits_so_long_and_no_longer() -> None:
    work = Work()
    wait_for(work, torch.device("cpu"), 3.0)
    wait_for(work, torch.device("cpu"), -1.0)  # late already: a moment, as 0 would mean for ever
    assert work.waits == [(timedelta(seconds=3),), (timedelta(milliseconds=1),)]


def test_a_timeout_does_not_stop_the_host_for_an_accelerator() -> None:
    work = Work()
    wait_for(work, torch.device("cuda", 0), 3.0)
    assert work.waits == [()]
