"""An encoder with its projector: the node of the model graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.projector import Projector
from parallel.axis import Axes, Axis
from parallel.param import keep_whole

FREEZE = ("none", "encoder", "projector", "all")


class EncoderModule(nn.Module):
    """ItemBatch to Features of the language model's width. cfg: the encoder's options."""

    def __init__(self, encoder: Encoder, projector: Projector, cfg: Any) -> None:
        super().__init__()
        self.encoder, self.projector, self.cfg = encoder, projector, cfg

    def forward(self, batch: ItemBatch) -> Features:
        """Raises ValueError naming the item where the encoder gives other rows than its rows() promised."""
        features = self.encoder(batch)
        promised = tuple(self.encoder.rows(self.cfg, meta) for meta in batch.metas)
        if features.rows != promised or features.values.shape[0] != sum(promised):
            pairs = list(zip(features.rows, promised, strict=False))
            item = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            gave = features.rows[item] if item < len(features.rows) else "no"
            need = promised[item] if item < len(promised) else features.values.shape[0]
            raise RowsMismatch(item, f"{type(self.encoder).__name__} gave {gave} rows, rows() says {need}")
        return Features(self.projector(features.values), features.rows)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Submodules that may be gathered and freed on their own."""
        return self.encoder.layers

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Trainable groups by name."""
        return {"encoder": list(self.encoder.parameters()), "projector": list(self.projector.parameters())}

    def freeze(self, what: str) -> None:
        """Stop training a group: none, encoder, projector or all."""
        for name, params in self.groups().items():
            for p in params:
                p.requires_grad_(what not in (name, "all"))


class RowsMismatch(ValueError):
    """Features do not fit their placeholders. item: index in the batch."""

    def __init__(self, item: int, why: str) -> None:
        super().__init__(f"item {item}: {why}")
        self.item, self.why = item, why


def encoder_axes(cls: type[Encoder], axes: Axes) -> Axes:
    """What an encoder and its projector compute over: tp where it is cut, nothing where it is replicated."""
    return Axes(tp=axes.tp) if cls.tensor_parallel else Axes(tp=Axis.single("tp"))


def build_encoder_module(
    cls: type[Encoder],
    cfg: Any,
    *,
    d_out: int,
    projector_hidden: int,
    axes: Axes,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> EncoderModule:
    """Build an encoder and its projector with global shapes (cut later by parallel.shard)."""
    inner = encoder_axes(cls, axes)
    encoder = cls(cfg, inner, device=device, dtype=dtype)
    projector = Projector(cls.feature_width(cfg), projector_hidden, d_out, inner, device=device, dtype=dtype)
    module = EncoderModule(encoder, projector, cfg)
    if not cls.tensor_parallel:
        keep_whole(module)
    return module


def module_flops(cls: type[Encoder], cfg: Any, meta: Meta, d_out: int, hidden: int) -> float:
    """Forward FLOPs of one item, projector (d_out wide) included."""
    return cls.cost(cfg, meta) + 2.0 * cls.rows(cfg, meta) * hidden * (cls.feature_width(cfg) + d_out)
