"""Grouped-query attention, with rotary positions or none: heads over tp, tokens over cp."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from llm.cache import CachedPacking, attend_cached
from llm.config import LLMConfig
from llm.recompute import run
from parallel.context_parallel import ContextPacking, context_attention
from parallel.sequence.packed import Packing, attention
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.heads import share_heads
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear, enter, leave
from parallel.topology.axis import Axes


class Attention(nn.Module):
    """Causal attention within each document; several query heads share a key/value head (arXiv 2305.13245).

    With more tp ranks than key/value heads, each rank computes those that its own query heads read.
    """

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.axes, self.head_dim, self.rope_theta = axes, cfg.head_dim, cfg.rope_theta
        self.shared = share_heads(cfg.n_heads, cfg.n_kv_heads, axes.tp.size, axes.tp.rank)
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        own = self.shared.count * cfg.head_dim
        self.sizes = [q // axes.tp.size, own, own]
        for name, width in {"q": q, "k": kv, "v": kv}.items():
            init = normal(cfg.init_std)
            spec = ParamSpec(init, shard_dim=0) if name == "q" else self.shared.spec(init)
            declare(self, name, (width, cfg.d_model), spec, **factory)
            if cfg.attention_bias:
                declare(self, f"{name}_bias", (width,), replace(spec, init=constant(0.0)), **factory)
        self.out = Linear(q, cfg.d_model, normal(cfg.out_std), shard="row", **factory)
        if cfg.attention_bias:
            # Added after the sum over tp, so that it counts once.
            after = ParamSpec(constant(0.0), partial=axes.sequence_parallel)
            declare(self, "bias", (cfg.d_model,), after, **factory)
        else:
            self.bias = None
        self.recompute: frozenset[str] = frozenset()

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        x = enter(x, self.axes)
        biases = None if self.bias is None else self._used("_bias")
        joined = joined_linear(x, self._used(""), biases)
        q, k, v = (
            torch.unflatten(t, -1, (-1, self.head_dim)) for t in torch.split(joined, self.sizes, dim=-1)
        )
        y = run("attention_core" in self.recompute, self._core, q, k, v, packing)
        y = leave(self.out(y.flatten(1)), self.axes)
        return y if self.bias is None else y + local(self.bias)

    def _used(self, suffix: str) -> list[Tensor]:
        """Rows of the weights (or biases) of q, k and v for the heads of this rank."""
        q, k, v = (local(getattr(self, name + suffix)) for name in ("q", "k", "v"))
        return [q, *(self.shared.used(w, self.head_dim) for w in (k, v))]

    def _core(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if self.rope_theta is not None:
            q, k = rotate(q, k, packing.position, self.rope_theta)
        k, v = self.shared.spread(k), self.shared.spread(v)
        if isinstance(packing, ContextPacking):
            return context_attention(q, k, v, packing)
        assert self.axes.cp.size == 1, (
            "under cp a layer needs the packing of parallel.context_parallel.pack()"
        )
        if isinstance(packing, CachedPacking):
            kept = packing.keep(self, k, v)
            if not packing.begins:
                return attend_cached(q, kept, packing.position)
        return attention(q, k, v, packing, causal=True)


def rotate(q: Tensor, k: Tensor, position: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv 2104.09864): q and k [T, H, D], rotated by position [T] in their document.

    Feature i is paired with i + D / 2, as in published checkpoints.
    """
    acc, half = accumulation_dtype(q.dtype), q.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64, device=q.device) / half)
    angle = position.unsqueeze(-1) * speed  # float64: in float32 the angle is off by 0.03 at 1M
    cos, sin = (f(angle).to(acc).unsqueeze(1) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        low, high = x.to(acc).chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    return turn(q), turn(k)
