"""Tensors that are made only when they are written, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Lazy:
    """Tensors to save, of one process. shapes: global shape and dtype by name. read: makes one."""

    shapes: Mapping[str, tuple[Shape, torch.dtype]]
    read: Callable[[str], Tensor]

    def stand_ins(self) -> dict[str, Tensor]:
        """Tensors of these shapes that take no memory."""
        return {n: torch.empty(shape, dtype=kind, device="meta") for n, (shape, kind) in self.shapes.items()}


class LazyPlanner(DefaultSavePlanner):
    """Plans a save of stand-ins, and makes each tensor as it is written."""

    def __init__(self, lazy: Lazy) -> None:
        super().__init__()
        self._read = lazy.read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor that is written next."""
        return self._read(index.fqn)
