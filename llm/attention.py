"""Grouped-query attention without positions, cut over tp by heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import LLMConfig
from parallel.axis import Axes
from parallel.packed import Packing, attention
from parallel.param import declare, local, normal
from parallel.tensor import Linear, enter, leave


class Attention(nn.Module):
    """Causal attention within each document; several query heads share a key/value head."""

    def __init__(
        self, cfg: LLMConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.axes, self.head_dim = axes, cfg.head_dim
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.sizes = [q // axes.tp.size, kv // axes.tp.size, kv // axes.tp.size]
        for name, width in {"q": q, "k": kv, "v": kv}.items():
            declare(
                self,
                name,
                (width, cfg.d_model),
                normal(cfg.init_std),
                shard_dim=0,
                device=device,
                dtype=dtype,
            )
        self.out = Linear(q, cfg.d_model, normal(cfg.out_std), shard="row", device=device, dtype=dtype)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        x = enter(x, self.axes)
        weight = torch.cat([local(self.q), local(self.k), local(self.v)])
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in F.linear(x, weight).split(self.sizes, dim=-1)
        )
        y = attention(q, k, v, packing, causal=True).flatten(1)
        return leave(self.out(y), self.axes)
