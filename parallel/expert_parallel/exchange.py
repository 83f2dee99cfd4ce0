"""The exchange of experts' rows, during which another computation of the rank may run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from parallel.comm.turns import in_turns
from parallel.topology.axis import Axis


def exchange_rows(x: Tensor, leaving: list[int], arriving: list[int], axis: Axis) -> Tensor:
    """All-to-all: leaving[r] rows of x [m, ..] go to rank r of the axis, arriving[r] rows come from it.

    Both are in the order of their ranks. A collective. Where the axis has turns and another computation is
    there to take one, it runs while the rows travel; all ranks of the axis must then have one.
    """
    out = x.new_empty((sum(arriving), *x.shape[1:]))
    x = x.contiguous()

    def start(later: bool) -> dist.Work | None:
        work: dist.Work | None = dist.all_to_all_single(
            out, x, arriving, leaving, group=axis.group, async_op=later
        )
        return work

    in_turns(axis.turns, start)
    return out
