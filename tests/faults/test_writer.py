"""The process that writes a rank's checkpoints ends too early."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan

from mm.checkpoint.state import Given
from mm.checkpoint.writer import Status, Writer
from mm.plan.drawn import NOTHING
from parallel.checkpoint.share import Share
from tests.faults.forge import children


def test_a_writer_that_ends_before_its_first_checkpoint_is_told(tmp_path: Path, processes: Any) -> None:
    writer = Writer(tmp_path, 0, lambda given: {}, lambda *given: set(), lambda: None, 60.0)
    try:
        (pid,) = children(writer._nursery.pid)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        writer.prepare(Share(0, 1, SavePlan([]), None), [torch.ones(3)], frozenset())
        writer.begin(Given(1, frozenset(), NOTHING, {}, {}))
        assert writer.poll(30.0) is Status.FAILED
        assert "the process that writes has ended with exit code -9" in writer.why
    finally:
        writer.close()
