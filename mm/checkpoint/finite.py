"""Weights that are not finite: they are not saved, and a checkpoint that has them is not resumed from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mm.checkpoint.state import buffers
from mm.errors import NonFinite
from mm.ranks.job import Job
from parallel.sharding.param import local

TOLD = 3  # tensors that a rank names


def names_not_finite(job: Job, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those whose part on this rank is not finite; of buffers, which may hold a mask, those with
    NaN. Waits for the device once."""
    parts = [(name, local(t)) for name, t in tensors]
    read = [(n, t) for n, t in parts if t.is_floating_point() and t.numel()]
    if not read:
        return []
    # The smallest and the largest element say it exactly: a sum of finite ones may not be finite.
    ends = torch.stack([e.to(torch.float64) for _, t in read for e in torch.aminmax(t.detach())])
    masks, both = buffers(job), zip(read, ends.view(-1, 2).tolist(), strict=True)
    return [n for (n, _), pair in both if any(map(math.isnan if n in masks else _infinite, pair))]


def _infinite(value: float) -> bool:
    return not math.isfinite(value)


def found_anywhere(job: Job, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """In words, which tensors are not finite and on which ranks, "" where all are; equal on all ranks, each
    of which calls this with its own tensors."""
    mine = names_not_finite(job, tensors)
    if not job.control.any(bool(mine)):
        return ""
    more = f" and {len(mine) - TOLD} more" if len(mine) > TOLD else ""
    heard = job.control.tell(f"{', '.join(mine[:TOLD])}{more}" if mine else "")
    return "; ".join(f"{what} on rank {r}" for r, what in enumerate(heard) if what)


def check_before_save(job: Job, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise NonFinite on all ranks where a tensor that would be saved is not finite on some rank."""
    found = found_anywhere(job, tensors)
    if found:
        raise NonFinite(
            f"after step {step} weights or optimizer state are not finite: {found}. No checkpoint of them "
            "was written, and those before it are kept; a resume goes on from the newest. Lower train.lr, or "
            "leave out the batches that lead here (data.skip)"
        )
