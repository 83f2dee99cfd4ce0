"""What encoders that are a stack of equal blocks have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import nn

from encoders.contract import Encoder
from parallel.sharding.dtypes import FactoryKwargs
from parallel.topology.axis import Axes
from parallel.topology.stage import Stage, whole


class StackedEncoder(Encoder):
    """A stem, cfg.layers blocks of width cfg.width, perhaps a norm: split over tp, cp and pipeline stages.

    The first stage has the stem and the last one the norm. Each stage has the blocks of its layers, under
    their global index.
    """

    tensor_parallel = context_parallel = pipeline = True

    def __init__(
        self,
        cfg: Any,
        axes: Axes,
        *,
        stage: Stage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg, self.axes, self.stage = cfg, axes, stage or whole(cfg.layers)
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        if self.stage.first:
            self.add_stem(**factory)
        self.blocks = nn.ModuleDict({str(i): self.make_block(i, **factory) for i in self.stage.layers})
        if self.stage.last:
            self.add_norm(**factory)

    @abstractmethod
    def add_stem(self, **factory: Unpack[FactoryKwargs]) -> None:
        """Register what comes before the first block."""

    @abstractmethod
    def make_block(self, layer: int, **factory: Unpack[FactoryKwargs]) -> nn.Module:
        """The block of layer number `layer`."""

    def add_norm(self, **factory: Unpack[FactoryKwargs]) -> None:
        """Register what comes after the last block; nothing by default."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks.values())

    @classmethod
    def layer_count(cls, cfg: Any) -> int:
        return int(cfg.layers)

    @classmethod
    def hidden_width(cls, cfg: Any, layer: int) -> int:
        return int(cfg.width)
