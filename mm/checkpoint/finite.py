"""Weights that are not finite: they are not saved, and a checkpoint that has them is not resumed from."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from mm.checkpoint.state import buffers
from mm.ranks.job import Job
from parallel.sharding.param import local

TOLD = 3  # tensors that a rank names


def names_not_finite(job: Job, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """not_finite() of tensors of a job, whose buffers may hold a mask."""
    return not_finite(tensors, buffers(job))


def not_finite(tensors: Iterable[tuple[str, Tensor]], masks: Collection[str]) -> list[str]:
    """The names of those whose part on this rank is not finite; of masks, which may hold infinities, those
    with NaN. Waits for the device once."""
    parts = [(name, local(t)) for name, t in tensors]
    read = [(n, t) for n, t in parts if t.is_floating_point() and t.numel()]
    if not read:
        return []
    # The smallest and the largest element say it exactly: a sum of finite ones may not be finite.
    ends = torch.stack([e.to(torch.float64) for _, t in read for e in torch.aminmax(t.detach())])
    both = zip(read, ends.view(-1, 2).tolist(), strict=True)
    return [n for (n, _), pair in both if any(map(math.isnan if n in masks else _infinite, pair))]


def _infinite(value: float) -> bool:
    return not math.isfinite(value)


def found_anywhere(job: Job, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """In words, which tensors are not finite and on which ranks, "" where all are; equal on all ranks, each
    of which calls this with its own tensors."""
    mine = names_not_finite(job, tensors)
    if not job.control.any(bool(mine)):
        return ""
    heard = job.control.tell(first_of(mine))
    return "; ".join(f"{what} on rank {r}" for r, what in enumerate(heard) if what)


def first_of(names: list[str]) -> str:
    """The first TOLD of some names, and how many more there are."""
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return f"{', '.join(names[:TOLD])}{more}"
