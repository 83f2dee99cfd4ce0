"""The weights of one module of a distributed checkpoint, as they are exported."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from parallel import checkpoint
from parallel.sharding.low_rank import adapters_of
from parallel.sharding.optim import AVERAGE, average_name


@dataclass(frozen=True)
class Stored:
    """A module of a complete checkpoint (parallel.checkpoint), saved under any layout.

    name: of the module. average: the average of the weights, for those that have one; it must be there.
    scale: of adapters (parallel.sharding.low_rank), which are merged into their weights.
    """

    path: Path
    name: str = "llm"
    average: bool = False
    scale: float = 1.0

    @cached_property
    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """By full name. Raises ValueError where there is no average and one is wanted."""
        found = checkpoint.describe(self.path)
        if self.average and not any(key.startswith(f"{self.name}.{AVERAGE}.") for key in found):
            raise ValueError(
                f"{self.path} has no average of {self.name}'s weights; needed: a run with train.average"
            )
        return found

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters of these names, whole, adapters merged. Raises ValueError where one is missing."""
        out = self._read(names)
        for n in names:
            a, b = adapters_of(n)
            if f"{self.name}.{a}" in self._shapes:
                found = self._read([a, b])
                change = found[b].double() @ found[a].double() * self.scale
                out[n] = (out[n].double() + change).to(out[n].dtype)
        return out

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        keys = {n: self._key(n) for n in names}
        out = {}
        for n, key in keys.items():
            if key not in self._shapes:
                raise ValueError(f"{self.path} has no {self.name}.{n}, which a model of this config has")
            shape, kind = self._shapes[key]
            out[n] = torch.empty(shape, dtype=kind)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is intended
            checkpoint.load(self.path, {keys[n]: t for n, t in out.items()})
        return out

    def _key(self, parameter: str) -> str:
        averaged = f"{self.name}.{average_name(parameter)}"
        return averaged if self.average and averaged in self._shapes else f"{self.name}.{parameter}"
