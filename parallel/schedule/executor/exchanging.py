"""Stand-ins of computations that exchange rows of experts: pieces that sleep, stamps that travel between.

A stamp is when its rank began the exchange. Whoever waits for an exchange waits until the link would have
brought the rows of all, by the cost model. Those of one rank follow one another.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from parallel.comm.turns import Turns
from parallel.schedule.simulator.costs import Turns as Pieces


class Exchanging:
    """Carries out computations by turns. `turns.run` runs the two of a pair."""

    def __init__(self, unit: float) -> None:
        self.unit = unit  # seconds of sleep for each second of the cost model
        self.turns = Turns(torch.device("cpu"))
        self._link = 0.0  # when this rank's link is free

    def compute(self, pieces: Pieces, group: Any) -> None:
        """Sleep piece by piece, and exchange in between over `group` (None: this rank alone)."""
        time.sleep(self.unit * pieces.piece)
        for seconds in pieces.exchanges:
            self._exchange(self.unit * seconds, group)
            time.sleep(self.unit * pieces.piece)

    def _exchange(self, seconds: float, group: Any) -> None:
        members = 1 if group is None else group.size()
        mine = torch.full((members,), time.monotonic(), dtype=torch.float64)
        stamps = mine.clone()
        work = None if group is None else dist.all_to_all_single(stamps, mine, group=group, async_op=True)
        self.turns.hand_over()
        if work is not None:
            work.wait()
        self._link = max(self._link, float(stamps.max())) + seconds
        time.sleep(max(0.0, self._link - time.monotonic()))
