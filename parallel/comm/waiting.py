"""Waiting for a message under way."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def wait_for(work: dist.Work, device: torch.device, timeout_s: float) -> None:
    """Order what follows on `device` after `work`, a message of tensors on it.

    On the CPU the host waits, for at most timeout_s seconds, then raises RuntimeError. On an accelerator the
    device's queue waits and the host goes on; the group's own timeout is then the bound. A timeout given to
    Work.wait() would block the host there until the message has arrived.
    """
    if device.type == "cpu":
        work.wait(timedelta(seconds=max(timeout_s, 0.001)))
    else:
        work.wait()
