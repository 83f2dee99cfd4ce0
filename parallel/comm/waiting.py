"""Waiting for a message under way."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch


def wait_for(work: Any, device: torch.device, timeout_s: float) -> None:
    """Have what follows on `device` come after `work`, a message of its tensors.

    The host waits for the host's own, no longer than timeout_s: RuntimeError then. For an accelerator its
    queue waits and the host goes on: a timeout given to wait() would stop the host until the message is
    there (torch.distributed.Work.wait), so that the group's own timeout is the bound.
    """
    if device.type == "cpu":
        work.wait(timedelta(seconds=max(timeout_s, 0.001)))
    else:
        work.wait()
