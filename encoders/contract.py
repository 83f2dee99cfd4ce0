"""What an encoder is: the contract that built-in and plug-in encoders fulfil.

Row counts and costs follow from an item's metadata alone, without running anything, because the step plan is
made from them on every rank. Inputs and features are packed end to end; an encoder must run on no items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from parallel.axis import Axes

Meta = Mapping[str, int]


@dataclass(frozen=True)
class ItemBatch:
    """Items packed end to end: values [sum of lengths, *input_shape], inputs per item, metadata per item."""

    values: Tensor
    lengths: tuple[int, ...]
    metas: tuple[Meta, ...]


class Features(NamedTuple):
    """values [rows, width], and the rows of each item in order. A tuple, so that FSDP sees the tensor."""

    values: Tensor
    rows: tuple[int, ...]

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """First row of each item, and the total."""
        return (0, *accumulate(self.rows))


class Encoder(nn.Module, ABC):
    """An encoder of one modality. Register it, or name it `package.module:Class` in the config.

    Config: a frozen dataclass of its options. tensor_parallel: whether its weights are cut over axes.tp; if
    not, every tp rank runs the whole encoder on the same items. Parameters are declared with
    parallel.param.declare (or built from parallel.tensor layers) and read through parallel.param.local.
    recompute: keep only the layers' inputs and run them again in the backward; an encoder may ignore it.
    """

    Config: ClassVar[type]
    tensor_parallel: ClassVar[bool] = False
    recompute: bool = False

    @abstractmethod
    def __init__(
        self, cfg: Any, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()

    @classmethod
    @abstractmethod
    def feature_width(cls, cfg: Any) -> int:
        """Width of the rows that forward() gives."""

    @classmethod
    @abstractmethod
    def rows(cls, cfg: Any, meta: Meta) -> int:
        """How many rows an item gives."""

    @classmethod
    @abstractmethod
    def cost(cls, cfg: Any, meta: Meta) -> float:
        """Forward FLOPs of an item."""

    @classmethod
    @abstractmethod
    def prepare(cls, cfg: Any, payload: bytes, meta: Meta) -> Tensor:
        """An item's file to its input [n, *input_shape], float32 on the CPU; ValueError if unusable."""

    @classmethod
    @abstractmethod
    def input_shape(cls, cfg: Any) -> tuple[int, ...]:
        """Trailing shape of an item's input."""

    @classmethod
    def check(cls, cfg: Any, tp: int) -> None:
        """Refuse impossible options, or a tp that does not divide them: ValueError naming what works."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules that may be gathered, freed and recomputed on their own, in order."""
        return ()

    @abstractmethod
    def forward(self, batch: ItemBatch) -> Features:
        """Features of the items, in order."""


def pack_items(
    cls: type[Encoder],
    cfg: Any,
    tensors: Sequence[Tensor],
    metas: Sequence[Meta],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> ItemBatch:
    """Lay prepared items end to end; no items give an empty batch."""
    values = torch.cat(list(tensors)) if tensors else torch.zeros((0, *cls.input_shape(cfg)))
    return ItemBatch(values.to(device, dtype), tuple(len(t) for t in tensors), tuple(metas))
