"""Weights that are not finite: they are not saved, and a checkpoint that has them is not resumed from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm.errors import NonFinite
from mm.ranks.control import Control
from parallel.sharding.param import local

TOLD = 3  # tensors that a rank names


def names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those whose part on this rank is not finite. Waits for the device once."""
    parts = {name: local(t) for name, t in tensors.items()}
    read = {n: t for n, t in parts.items() if t.is_floating_point() and t.numel()}
    if not read:
        return []
    # The smallest and the largest element say it exactly: a sum of finite ones may not be finite.
    ends = torch.stack([e.to(torch.float64) for t in read.values() for e in torch.aminmax(t.detach())])
    fine: list[bool] = torch.isfinite(ends.view(-1, 2)).all(1).tolist()
    return [name for name, one in zip(read, fine, strict=True) if not one]


def found_anywhere(control: Control, tensors: Mapping[str, Tensor]) -> str:
    """In words, which tensors are not finite and on which ranks, "" where all are; equal on all ranks, each
    of which calls this with its own tensors."""
    mine = names_not_finite(tensors)
    if not control.any(bool(mine)):
        return ""
    more = f" and {len(mine) - TOLD} more" if len(mine) > TOLD else ""
    heard = control.tell(f"{', '.join(mine[:TOLD])}{more}" if mine else "")
    return "; ".join(f"{what} on rank {r}" for r, what in enumerate(heard) if what)


def check_before_save(control: Control, tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise NonFinite on all ranks where a tensor that would be saved is not finite on some rank."""
    found = found_anywhere(control, tensors)
    if found:
        raise NonFinite(
            f"after step {step} weights or optimizer state are not finite: {found}. No checkpoint of them "
            "was written, and those before it are kept; a resume goes on from the newest. Lower train.lr, or "
            "leave out the batches that lead here (data.skip)"
        )
