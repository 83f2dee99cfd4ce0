"""The few words that ranks exchange outside the model: one small message at each end of a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mm.errors import PolyrankError

SLOTS = 14  # bad sample ids that fit one message; more of them take another round


def whole_job() -> dist.ProcessGroup:
    """The default process group, which must be initialised."""
    group = dist.group.WORLD
    assert group is not None
    return group


@dataclass(frozen=True)
class Control:
    """Control messages over `group`, which holds every rank of the job."""

    group: dist.ProcessGroup
    device: torch.device

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's `values`, float64 [world, n], the same on all ranks."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self._gather(mine)

    def agree(self, step: int, digest: int, bad: Collection[int]) -> frozenset[int]:
        """Union over ranks of the samples found unreadable; empty means the step may run.

        Raises PolyrankError naming the ranks whose plan of `step` differs from rank 0's.
        """
        ids = sorted(bad)[:SLOTS]
        message = [digest, len(ids), *ids, *[-1] * (SLOTS - len(ids))]
        table = self._gather(torch.tensor(message, dtype=torch.int64, device=self.device))
        odd = [r for r in range(len(table)) if table[r, 0] != table[0, 0]]
        if odd:
            raise PolyrankError(
                f"step {step}: ranks {odd} planned another step than rank 0; the data, its index or the "
                "config differ between machines: compare them and start again"
            )
        return frozenset(int(i) for row in table for i in row[2 : 2 + row[1]])

    def _gather(self, mine: torch.Tensor) -> np.ndarray:
        world = dist.get_world_size(self.group)
        out = mine.new_empty(world * len(mine))
        dist.all_gather_into_tensor(out, mine, group=self.group)
        return out.view(world, len(mine)).cpu().numpy()
