"""One layer: a residual branch of any kind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Unpack

import torch
from torch import Tensor, nn

from llm.attention import Attention
from llm.config import LLMConfig
from llm.mamba import Mamba
from llm.mla import LatentAttention
from llm.mlp import MLP, config_mlp
from llm.moe import Choice, ForwardContext, MoE
from llm.norm import RMSNorm
from llm.offload import to_host
from llm.recompute import run
from parallel.sharding.dtypes import FactoryKwargs
from parallel.topology.axis import Axes


class Layer(nn.Module):
    """x + norm_after(mixer(norm(x))), or with one of the norms alone, as LLMConfig.norms says.

    symbol: the kind of mixer, as in LLMConfig.pattern. index: of the layer in the model, which decides its
    positions and window; None in the block of multi-token prediction. recompute: parts that are computed
    again in the backward (llm.recompute.PARTS). offload: tensors of at least so many bytes are kept for the
    backward in host memory; None keeps all on the device.
    """

    def __init__(
        self,
        symbol: str,
        cfg: LLMConfig,
        axes: Axes,
        index: int | None = None,
        **factory: Unpack[FactoryKwargs],
    ) -> None:
        super().__init__()
        self.recompute: frozenset[str] = frozenset()
        self.offload: int | None = None
        self.branch_scale = cfg.branch_scale
        self.norm = None if cfg.norms == "after" else RMSNorm(cfg, axes, **factory)
        self.norm_after = None if cfg.norms == "before" else RMSNorm(cfg, axes, **factory)
        self.mixer: nn.Module
        if symbol == "M":
            self.mixer = Mamba(cfg, axes, **factory)
        elif symbol == "*":
            latent = cfg.kv_rank is not None
            self.mixer = (LatentAttention if latent else Attention)(cfg, axes, index, **factory)
        elif symbol == "E":
            self.mixer = MoE(cfg, axes, **factory)
        else:
            self.mixer = config_mlp(cfg, cfg.mlp_ffn, axes, **factory)

    def forward(self, x: Tensor, ctx: ForwardContext, choice: Choice | None = None) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        h = x if self.norm is None else run("norm" in self.recompute, self.norm, x)
        if isinstance(self.mixer, MoE):
            y: Tensor = self.mixer(h, ctx, choice)
        elif isinstance(self.mixer, MLP):
            y = run("mlp" in self.recompute, self.mixer, h)
        else:
            y = self.mixer(h, ctx.packing)
        if self.norm_after is not None:
            y = run("norm" in self.recompute, self.norm_after, y)
        return torch.add(x, y, alpha=self.branch_scale)


def run_layer(layer: Layer, x: Tensor, ctx: ForwardContext) -> Tensor:
    """layer(x, ctx); keeps only x for the backward where the whole layer is recomputed."""
    with nullcontext() if layer.offload is None else to_host(layer, layer.offload):
        return run("full" in layer.recompute, layer, x, ctx, Choice())
