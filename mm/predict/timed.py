"""Steps of real jobs as they are timed to be compared with predictions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate


class Spent(NamedTuple):
    """Seconds of a step: wall, until the last rank is done; processor, of all threads of all ranks."""

    wall: float
    processor: float


def timed_step(job: Job, step: int, prepare: Callable[[], Prepared]) -> Spent:
    """Run a step, its update included, on all ranks; its data are prepared before the clock starts."""
    prepared = prepare()
    dist.barrier()
    start, process = time.perf_counter(), time.process_time()
    result = run_step(job, prepared, train=True)
    finish_step(job, result, step, learning_rate(job.blueprint.cfg.train, step))
    process = time.process_time() - process
    dist.barrier()
    found = everywhere((time.perf_counter() - start, process))
    return Spent(max(wall for wall, _ in found), sum(own for _, own in found))


def everywhere(value: Any) -> list[Any]:
    """The value of each rank, in order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
