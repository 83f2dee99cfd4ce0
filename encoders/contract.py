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

from parallel.topology.axis import Axes

Meta = Mapping[str, int]


@dataclass(frozen=True)
class ItemBatch:
    """Items packed end to end: values [sum of lengths, *input_shape], inputs per item, metadata per item.

    Where rows are cut over ranks, `metas` has all items of the lane, while values and lengths may have only
    those that this rank computes from (module.needed_items), item number `first` and the ones after it.
    """

    values: Tensor
    lengths: tuple[int, ...]
    metas: tuple[Meta, ...]
    first: int = 0


class Features(NamedTuple):
    """values [rows, width] (several levels: [rows, levels, width]), and the rows of each item in order.

    Where cp or sequence parallelism cuts the rows, values are this rank's stretch of them, from row `first`
    on, and `rows` still counts those of all items. A tuple, so that FSDP sees the tensor.
    """

    values: Tensor
    rows: tuple[int, ...]
    first: int = 0

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """First row of each item, and the total."""
        return (0, *accumulate(self.rows))


class Encoder(nn.Module, ABC):
    """An encoder of one modality. Register it, or name it `package.module:Class` in the config.

    Config: a frozen dataclass of its options. Parameters are declared with declare() or built from the layers
    of encoders.api, and read through local(); plain modules are taken in, with the values that they have, by
    adopt(). They are stored in the constructor's `dtype`, float32 where
    train.dtype is bfloat16, and compute in train.dtype. Buffers keep their values, and their dtype always.
    tensor_parallel: whether its weights are cut over axes.tp; if not, every tp rank runs the whole encoder on
    the same items. context_parallel: whether it gives just the rows of its place on axes.cp. pipeline:
    whether it takes `stage` (encoders.api.Stage, or None for all), builds only that stage's layers under
    their global names, and its forward takes the hidden states of the stage before as a second argument.
    What it does not declare is refused (encoders.module.check_encoder).
    input_dtype: in what dtype ItemBatch.values come, whatever prepare() gave: None for that in which the
    weights compute (train.dtype), so that layers take them as they are; torch.int64 for ids, or torch.float32
    for what bfloat16 would round too coarsely, such as times.
    recompute: keep only the layers' inputs and run them again in the backward; an encoder may ignore it.
    timeout_s: the longest wait for rows of another cp rank, in seconds.
    """

    Config: ClassVar[type]
    tensor_parallel: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = False
    pipeline: ClassVar[bool] = False
    input_dtype: ClassVar[torch.dtype | None] = None
    recompute: bool = False
    timeout_s: float = 120.0

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
        """An item's file to its input [n, *input_shape] on the CPU, which input_dtype says what becomes of;
        ValueError if unusable."""

    @classmethod
    @abstractmethod
    def input_shape(cls, cfg: Any) -> tuple[int, ...]:
        """Trailing shape of an item's input."""

    @classmethod
    def check(cls, cfg: Any, tp: int) -> None:
        """Refuse impossible options, or a tp that does not divide them: ValueError naming what works."""

    @classmethod
    def feature_levels(cls, cfg: Any) -> int:
        """Feature rows for each row of the item: the last layer's first, then those of earlier layers."""
        return 1

    @classmethod
    def layer_count(cls, cfg: Any) -> int:
        """How many layers pipeline stages may be cut between."""
        return 1

    @classmethod
    def stem_cost(cls, cfg: Any, meta: Meta) -> float:
        """The part of cost() that comes before the first layer; the layers have equal parts of the rest."""
        return 0.0

    @classmethod
    def hidden_width(cls, cfg: Any, layer: int) -> int:
        """Width of the hidden states that enter layer number `layer`, from the stage before."""
        raise ValueError(f"{cls.__name__} has no pipeline stages")

    @classmethod
    def tokens_per_row(cls, cfg: Any) -> int:
        """Hidden states between layers for each row of the output."""
        return 1

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules that may be gathered, freed and recomputed on their own, in order."""
        return ()

    @abstractmethod
    def forward(self, batch: ItemBatch) -> Features | Tensor:
        """Features of the items, in order. All stages of a pipeline but the last give hidden states instead,
        [this rank's rows * tokens_per_row, hidden_width]."""


def check_positive(name: str, cfg: Any, *options: str) -> None:
    """Refuse whole-number options of an encoder that are below 1."""
    for option in options:
        value = getattr(cfg, option)
        if value < 1:
            raise ValueError(f"{name} {option} is {value}; needed: at least 1")


def pack_items(
    cls: type[Encoder],
    cfg: Any,
    tensors: Sequence[Tensor],
    metas: Sequence[Meta],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    first: int = 0,
) -> ItemBatch:
    """Lay prepared items end to end; no items give an empty batch. metas may have more items than tensors,
    which are then those from number `first` on. dtype: what the weights compute in; values come in it where
    the encoder does not name an input_dtype of its own."""
    shape = tuple(cls.input_shape(cfg))
    for tensor in tensors:
        if tuple(tensor.shape[1:]) != shape:
            wanted = f"[n, {', '.join(map(str, shape))}], as input_shape says"
            raise ValueError(f"{cls.__name__}.prepare gave {list(tensor.shape)}; needed: {wanted}")
    values = torch.cat(list(tensors)) if tensors else torch.zeros((0, *shape))
    return ItemBatch(
        values.to(device, cls.input_dtype or dtype), tuple(len(t) for t in tensors), tuple(metas), first
    )


def join_batches(batches: Sequence[ItemBatch]) -> ItemBatch:
    """The items of several batches as one; each must have all of its items (no rows cut over ranks)."""
    assert all(len(b.lengths) == len(b.metas) for b in batches), "a batch with some of its items only"
    if len(batches) == 1:
        return batches[0]
    lengths = tuple(n for b in batches for n in b.lengths)
    return ItemBatch(
        torch.cat([b.values for b in batches]), lengths, tuple(m for b in batches for m in b.metas)
    )
