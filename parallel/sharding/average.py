"""An exponential average of weights, sharded as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallel.sharding.rules import Shard


class Average:
    """After each update decay * average + (1 - decay) * weights, of trained weights and in their dtype.

    The average begins as the weights after the first update, as in torch.optim.swa_utils.AveragedModel. It is
    kept as a Rule that updates nothing. Memory: as the trained weights on this rank.
    """

    def __init__(self, shards: Sequence[Shard], decay: float) -> None:
        self.shards, self.decay = shards, decay
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take the weights as they are now into the average; lr has no effect."""
        if not self.kept:
            self.state()
            return
        torch._foreach_lerp_([self.kept[s.name] for s in self.shards], self._weights(), 1 - self.decay)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By parameter, its average; made where there is none, from the weights as they are."""
        if not self.kept:
            self.kept = {s.name: s.local.detach().clone() for s in self.shards}
        return {name: {"value": value} for name, value in self.kept.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; a second call undoes it. Takes memory for one parameter."""
        self.state()
        for s, weight in zip(self.shards, self._weights(), strict=True):
            before = weight.clone()
            weight.copy_(self.kept[s.name])
            self.kept[s.name].copy_(before)

    def _weights(self) -> list[Tensor]:
        return [s.local.detach() for s in self.shards]
