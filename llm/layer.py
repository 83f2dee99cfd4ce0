"""One layer: a residual branch of any kind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Unpack

from torch import Tensor, nn

from llm.attention import Attention
from llm.config import LLMConfig
from llm.mamba import Mamba
from llm.mlp import MLP, config_mlp
from llm.moe import Choice, ForwardContext, MoE
from llm.norm import RMSNorm
from llm.offload import to_host
from llm.recompute import run
from parallel.sharding.dtypes import FactoryKwargs
from parallel.topology.axis import Axes


class Layer(nn.Module):
    """x + mixer(norm(x)); symbol: the kind of mixer, as in LLMConfig.pattern.

    recompute: parts that are computed again in the backward (llm.recompute.PARTS). offload: tensors of at
    least so many bytes are kept for the backward in host memory; None keeps all on the device.
    """

    def __init__(self, symbol: str, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.recompute: frozenset[str] = frozenset()
        self.offload: int | None = None
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, partial=axes.sequence_parallel, **factory)
        self.mixer: nn.Module
        if symbol == "M":
            self.mixer = Mamba(cfg, axes, **factory)
        elif symbol == "*":
            self.mixer = Attention(cfg, axes, **factory)
        elif symbol == "E":
            self.mixer = MoE(cfg, axes, **factory)
        else:
            self.mixer = config_mlp(cfg, cfg.mlp_ffn, axes, **factory)

    def forward(self, x: Tensor, ctx: ForwardContext, choice: Choice | None = None) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        h = run("norm" in self.recompute, self.norm, x)
        if isinstance(self.mixer, MoE):
            y: Tensor = self.mixer(h, ctx, choice)
            return x + y
        if isinstance(self.mixer, MLP):
            return x + run("mlp" in self.recompute, self.mixer, h)
        y = self.mixer(h, ctx.packing)
        return x + y


def run_layer(layer: Layer, x: Tensor, ctx: ForwardContext) -> Tensor:
    """layer(x, ctx); keeps only x for the backward where the whole layer is recomputed."""
    with nullcontext() if layer.offload is None else to_host(layer, layer.offload):
        return run("full" in layer.recompute, layer, x, ctx, Choice())
