"""What an encoder is: the contract that built-in and plug-in encoders fulfil.

Row counts and costs follow from an item's metadata alone, because every rank makes the step plan from them
before anything runs (law 4). Inputs and features are packed end to end. An encoder must run on no items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from parallel.sequence.grid import RowGrid
from parallel.sequence.host import to_device
from parallel.topology.axis import Axes

Meta = Mapping[str, int]


@dataclass(frozen=True)
class ItemBatch:
    """Prepared items, packed end to end.

    values: [sum of lengths, *input_shape], in the encoder's input_dtype.
    lengths: how many inputs each item has that is in `values`.
    metas: metadata of all items of this dp rank in the batch, also of those that are not in `values`.
    first: index in `metas` of the first item in `values`. Where rows are split over cp, a rank is given the
        items that it computes from, and no others (encoders.module.needed_items).
    """

    values: Tensor
    lengths: tuple[int, ...]
    metas: tuple[Meta, ...]
    first: int = 0


class Features(NamedTuple):
    """What an encoder's forward() returns. It is a tuple, so that FSDP finds the tensor in it.

    values: [rows, width], or [rows, levels, width] where feature_levels is above 1. Where cp or sequence
        parallelism splits the rows, these are the rows of this rank only.
    rows: how many rows each item of the dp rank has, in order, wherever these rows are.
    first: index of the first row of `values` among all rows of the dp rank.
    """

    values: Tensor
    rows: tuple[int, ...]
    first: int = 0

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """First row of each item, and the total: [items + 1]."""
        return (0, *accumulate(self.rows))


class Encoder(nn.Module, ABC):
    """An encoder of one modality. Register it, or name it `package.module:Class` in the config.

    Parameters are declared with declare(), or belong to layers of encoders.api, and are read through local();
    adopt() declares those of plain modules. They are stored in the constructor's `dtype`, which is float32
    where train.dtype is bfloat16, and compute in train.dtype. Buffers keep their values and their dtype.

    Config: frozen dataclass of the encoder's options.
    tensor_parallel: whether its weights are sharded over axes.tp. If not, every tp rank runs the whole
        encoder on the same items.
    context_parallel: whether it returns only the rows of its rank on axes.cp.
    pipeline: whether it takes the keyword `stage` (a Stage, or None for all layers), builds the layers of
        that stage only, under their global index, and takes the hidden states of the stage before as a second
        argument of forward().
    input_dtype: dtype of ItemBatch.values. None: the dtype that the weights compute in (train.dtype),
        whatever prepare() gave. torch.int64 suits ids; torch.float32 suits what bfloat16 would round, such as
        times.
    recompute: keep only the inputs of the layers and compute the rest again in the backward. An encoder may
        ignore it.
    timeout_s: longest wait for rows of another cp rank, in seconds.

    A degree that is not declared here is refused before anything runs (encoders.module.check_encoder).
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
        """cfg: a Config; axes: the axes that the encoder computes over. Parameters are made with their global
        shapes on `device`, in `dtype`. An encoder that declares pipeline also takes the keyword `stage`."""
        super().__init__()

    @classmethod
    @abstractmethod
    def feature_width(cls, cfg: Any) -> int:
        """Width of a feature row."""

    @classmethod
    @abstractmethod
    def rows(cls, cfg: Any, meta: Meta) -> int:
        """How many feature rows an item has. Raises ValueError for an item that the encoder cannot take."""

    @classmethod
    def pieces(cls, cfg: Any, meta: Meta) -> Sequence[str | Meta]:
        """What an item becomes in a sequence: texts, and the metadata of items that each are computed by
        themselves, such as tags and tiles; as a rule the item itself. Raises ValueError as rows() does."""
        return (meta,)

    @classmethod
    def omits(cls, cfg: Any, meta: Meta) -> str:
        """What of an item is left out, in words that a run says at its start; "" where nothing is."""
        return ""

    @classmethod
    @abstractmethod
    def cost(cls, cfg: Any, meta: Meta) -> float:
        """FLOPs of the forward of an item, without the projector."""

    @classmethod
    @abstractmethod
    def prepare(cls, cfg: Any, payload: bytes, meta: Meta) -> Tensor:
        """An item's file, as bytes, to its inputs [n, *input_shape] on the CPU, in any dtype: it becomes
        input_dtype later. Raises ValueError for a file that cannot be used; its sample is then skipped."""

    @classmethod
    def prepare_into(cls, cfg: Any, payload: bytes, meta: Meta, out: Tensor) -> Tensor:
        """prepare() with its inputs in `out`, the place that a batch has for them: [n, *input_shape] in the
        dtype of ItemBatch.values. Returns out, or the inputs where they are of another number. An encoder may
        write there what it would make anew; the values are then those of prepare(), converted."""
        made = cls.prepare(cfg, payload, meta)
        return out.copy_(made) if made.shape == out.shape else made

    @classmethod
    @abstractmethod
    def input_shape(cls, cfg: Any) -> tuple[int, ...]:
        """Shape of one input: the trailing dims of ItemBatch.values."""

    @classmethod
    def input_count(cls, cfg: Any, meta: Meta) -> int:
        """How many inputs prepare() makes of an item: the first dim. Asked where nothing is read, as in a
        virtual step."""
        return cls.rows(cfg, meta) * cls.tokens_per_row(cfg)

    @classmethod
    def row_grid(cls, cfg: Any, meta: Meta) -> RowGrid | None:
        """How the rows of an item lie in frames, rows and columns, for a language model with positions of
        three axes; None: one after another, as text."""
        return None

    @classmethod
    def example(cls, cfg: Any, rows: int) -> Meta | None:
        """Metadata of some item of at most about `rows` rows, for plans without data; None where the encoder
        names none."""
        return None

    @classmethod
    def check(cls, cfg: Any, tp: int) -> None:
        """Raise ValueError, naming what works, for impossible options and for those that tp does not divide.
        tp is 1 for an encoder that does not declare tensor_parallel."""

    @classmethod
    def feature_levels(cls, cfg: Any) -> int:
        """Features of each row: those of the last layer come first, then those of earlier layers."""
        return 1

    @classmethod
    def layer_count(cls, cfg: Any) -> int:
        """How many layers pipeline stages may share out."""
        return 1

    @classmethod
    def stem_cost(cls, cfg: Any, meta: Meta) -> float:
        """FLOPs of what comes before the first layer. The layers have equal parts of the rest of cost()."""
        return 0.0

    @classmethod
    def hidden_width(cls, cfg: Any, layer: int) -> int:
        """Width of the hidden states that a stage which begins at layer number `layer` receives."""
        raise ValueError(f"{cls.__name__} has no pipeline stages")

    @classmethod
    def tokens_per_row(cls, cfg: Any) -> int:
        """Hidden states between layers for each feature row."""
        return 1

    @classmethod
    def prefix_tokens(cls, cfg: Any) -> int:
        """Hidden states between layers that each item has before those of its rows, such as a class token."""
        return 0

    @classmethod
    def tail_tokens(cls, cfg: Any, meta: Meta) -> int:
        """Hidden states between layers that an item has after those of its rows, such as one that is in no
        pair."""
        return 0

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules, in order, that FSDP may gather and free one at a time."""
        return ()

    @abstractmethod
    def forward(self, batch: ItemBatch) -> Features | Tensor:
        """Features of the items, in order. Stages of a pipeline other than the last return hidden states,
        [this rank's rows * tokens_per_row, prefixes and tails, hidden_width]."""


def check_positive(name: str, cfg: Any, options: Sequence[str]) -> None:
    """Raise ValueError for one of these whole-number options of the encoder `name` that is below 1."""
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
    """Prepared items as a batch on `device`; no items give an empty batch.

    tensors: [n, *input_shape] of each item from number `first` of `metas` on.
    dtype: what the weights compute in; values have it where the encoder names no input_dtype.
    Raises ValueError for a tensor of another shape than input_shape says. Tensors that lie one after another
    in one memory are not copied; the batch shares it.
    """
    shape = tuple(cls.input_shape(cfg))
    for tensor in tensors:
        if tuple(tensor.shape[1:]) != shape:
            wanted = f"[n, {', '.join(map(str, shape))}], as input_shape says"
            raise ValueError(f"{cls.__name__}.prepare gave {list(tensor.shape)}; needed: {wanted}")
    values = _joined(tensors) if tensors else torch.zeros((0, *shape))
    values = to_device(values.to(cls.input_dtype or dtype), device)
    return ItemBatch(values, tuple(t.shape[0] for t in tensors), tuple(metas), first)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """torch.cat(tensors) of at least one, without a copy where they lie so already."""
    one = tensors[0]
    memory, first = one.untyped_storage().data_ptr(), one.storage_offset()
    at = first
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == memory and tensor.dtype == one.dtype
        if not (same and tensor.storage_offset() == at and tensor.is_contiguous()):
            return torch.cat(list(tensors))
        at += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    # The strides of a tensor of one row say nothing of where a second would lie.
    return one.as_strided((at - first,), (1,)).view(rows, *one.shape[1:])


def join_batches(batches: Sequence[ItemBatch]) -> ItemBatch:
    """The items of several batches as one batch. The items whose values are there follow each other in it."""
    if len(batches) == 1:
        return batches[0]
    metas = tuple(m for b in batches for m in b.metas)
    ends = accumulate(len(b.metas) for b in batches)
    firsts = [end - len(b.metas) + b.first for end, b in zip(ends, batches, strict=True)]
    spans = [(n, n + len(b.lengths)) for n, b in zip(firsts, batches, strict=True) if b.lengths]
    assert all(stop == start for (_, stop), (start, _) in pairwise(spans)), "values of some items are missing"
    return ItemBatch(
        torch.cat([b.values for b in batches]),
        tuple(n for b in batches for n in b.lengths),
        metas,
        spans[0][0] if spans else 0,
    )
