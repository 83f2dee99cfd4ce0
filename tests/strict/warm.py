"""Uses every communicator of a job once, so that its hosts meet at no first use later."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.distributed as dist

from tests.strict.group import StrictGroup


def warm_up() -> None:
    """Called by all ranks of a strict run, when its groups are made.

    All ranks take their groups, and the pairs in them, in one order and wait for each step. The first step
    that is not done yet can therefore go on, so this cannot hang.
    """
    world = dist.group.WORLD
    assert isinstance(world, StrictGroup)
    for group in list(world.link.groups):
        dist.all_reduce(torch.zeros(1), group=group)
        others = [r for r in group.ranks if r != dist.get_rank()]
        ops = [dist.P2POp(dist.irecv, torch.zeros(1), r, group) for r in others]
        ops += [dist.P2POp(dist.isend, torch.zeros(1), r, group) for r in others]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        for low, high in combinations(sorted(group.ranks), 2):
            if dist.get_rank() in (low, high):
                _exchange(group, low, high)


def _exchange(group: StrictGroup, low: int, high: int) -> None:
    """An unbatched message each way."""
    first = dist.get_rank() == low
    for call in (dist.isend, dist.irecv) if first else (dist.irecv, dist.isend):
        work = call(torch.zeros(1), high if first else low, group)
        assert work is not None
        work.wait()
