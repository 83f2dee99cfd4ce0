"""A checkpoint of which one process reads a few tensors at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.distributed import described, fill
from parallel.checkpoint.metadata import SafeReader


@dataclass(frozen=True)
class Opened:
    """The tensors of the checkpoint at `path`, whose metadata are read once: they list every tensor."""

    path: Path

    @cached_property
    def _reader(self) -> SafeReader:
        return SafeReader(self.path)

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(global shape, dtype) by name."""
        return described(self._reader)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole tensors by name, on the host. Raises BadCheckpoint where one is missing or cannot be read."""
        out = {n: torch.empty(self.shapes[n][0], dtype=self.shapes[n][1]) for n in names if n in self.shapes}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is intended
            fill(self._reader, {n: out.get(n, torch.empty(0)) for n in names})
        return out
