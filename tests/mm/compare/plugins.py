"""An encoder that is slow on purpose, so that what bounds a layout is known before it is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from encoders.api import Features, ItemBatch
from tests.mm.plugins import Wrapper, WrapperConfig


@dataclass(frozen=True)
class SlowConfig(WrapperConfig):
    """spin: seconds of processor time that each item takes. fails: the rank of the job that has no memory for
    this encoder, -1 for none."""

    spin: float = 0.03
    fails: int = -1


class Slow(Wrapper):
    """A Wrapper that takes its time over each item, as processor time: other work on the machine makes it no
    more of that."""

    Config = SlowConfig
    cfg: SlowConfig

    def forward(self, batch: ItemBatch, hidden: torch.Tensor | None = None) -> Features | torch.Tensor:
        if torch.distributed.get_rank() == self.cfg.fails:
            raise MemoryError("no more")
        end = time.thread_time() + self.cfg.spin * len(batch.metas)
        while time.thread_time() < end:
            pass
        return super().forward(batch, hidden)
