"""Grouped-query attention, with rotary positions or none: heads over tp, tokens over cp."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from llm.cache import CachedPacking, attend_cached
from llm.config import LLMConfig
from llm.norm import norm_start, norms_of_all_heads, rms_norm
from llm.recompute import run
from llm.rotary import attention_factor, axis_of_pairs, speeds
from parallel.context_parallel import ContextPacking, context_attention
from parallel.sequence.buckets import Limits
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing, attention
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.heads import share_heads
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear, enter, leave
from parallel.topology.axis import Axes


class Heads(nn.Module):
    """What mixers of heads share: the map from their heads back to the hidden states."""

    axes: Axes
    bias: Tensor | None

    def add_output(self, cfg: LLMConfig, width: int, **factory: Unpack[FactoryKwargs]) -> None:
        """Register the map; width: of all heads together."""
        self.out = Linear(width, cfg.d_model, normal(cfg.out_std), shard="row", **factory)
        if cfg.attention_bias:
            # Added after the sum over tp, so that it counts once.
            after = ParamSpec(constant(0.0), partial=self.axes.sequence_parallel)
            declare(self, "bias", (cfg.d_model,), after, **factory)
        else:
            self.bias = None

    def output(self, y: Tensor) -> Tensor:
        """The heads of this rank [T, heads, width] as hidden states."""
        y = leave(self.out(y.flatten(1)), self.axes)
        return y if self.bias is None else y + local(self.bias)


class Attention(Heads):
    """Causal attention within each document; several query heads share a key/value head (arXiv 2305.13245).

    With more tp ranks than key/value heads, each rank computes those that its own query heads read.
    layer: its index in the model, None in the block of multi-token prediction.
    """

    adapts = ("q", "k", "v")

    def __init__(
        self, cfg: LLMConfig, axes: Axes, layer: int | None = None, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        self.cfg, self.axes, self.head_dim = cfg, axes, cfg.head_dim
        self.rope = Rotation(cfg, layer) if cfg.rope_of(layer)[0] is not None else None
        self.limits = Limits(cfg.window_of(layer), cfg.attention_cap)
        self.shared = share_heads(cfg.n_heads, cfg.n_kv_heads, axes.tp.size, axes.tp.rank)
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        own = self.shared.count * cfg.head_dim
        self.sizes = [q // axes.tp.size, own, own]
        self.biased = cfg.attention_bias or cfg.qkv_bias
        for name, width in {"q": q, "k": kv, "v": kv}.items():
            init = normal(cfg.init_std)
            spec = ParamSpec(init, shard_dim=0) if name == "q" else self.shared.spec(init)
            declare(self, name, (width, cfg.d_model), spec, **factory)
            if self.biased:
                declare(self, f"{name}_bias", (width,), replace(spec, init=constant(0.0)), **factory)
            if name != "v" and cfg.qk_norm == "full":
                declare(self, f"{name}_norm", (width,), replace(spec, init=norm_start(cfg)), **factory)
            elif name != "v" and cfg.qk_norm == "head":
                # Each tp rank norms heads of its own with the one weight.
                each = ParamSpec(norm_start(cfg), partial=axes.tp.size > 1)
                declare(self, f"{name}_norm", (cfg.head_dim,), each, **factory)
        if cfg.attention_sinks:
            declare(self, "sinks", (cfg.n_heads,), ParamSpec(normal(cfg.init_std), shard_dim=0), **factory)
        self.add_output(cfg, q, **factory)
        self.recompute: frozenset[str] = frozenset()

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        x = enter(x, self.axes)
        biases = self._used("_bias") if self.biased else None
        joined = joined_linear(x, self._used(""), biases)
        q, k, v = (
            torch.unflatten(t, -1, (-1, self.head_dim)) for t in torch.split(joined, self.sizes, dim=-1)
        )
        y = run("attention_core" in self.recompute, self._core, q, k, v, packing)
        return self.output(y)

    def _used(self, suffix: str) -> list[Tensor]:
        """Rows of the weights (or biases) of q, k and v for the heads of this rank."""
        q, k, v = (adapted(self, name + suffix) for name in self.adapts)
        return [q, *(self.shared.used(w, self.head_dim) for w in (k, v))]

    def _core(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if self.cfg.qk_norm != "none":
            q, k = self._normed(q, k)
        if self.rope is not None:
            q, k = self.rope(q, k, packing)
        k, v, scale = self.shared.spread(k), self.shared.spread(v), self.cfg.attention_scale
        limits = replace(self.limits, sinks=local(self.sinks)) if self.cfg.attention_sinks else self.limits
        if isinstance(packing, ContextPacking):
            return context_attention(q, k, v, packing, scale=scale, limits=limits)
        assert self.axes.cp.size == 1, (
            "under cp a layer needs the packing of parallel.context_parallel.pack()"
        )
        if isinstance(packing, CachedPacking):
            kept = packing.keep(self, k, v)
            if not packing.begins:
                return attend_cached(q, kept, packing.position, scale=scale, limits=limits)
        return attention(q, k, v, packing, causal=True, scale=scale, limits=limits)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The norms of queries and keys, of each head or over all heads of all tp ranks."""
        cfg, q_norm, k_norm = self.cfg, local(self.q_norm), local(self.k_norm)
        if cfg.qk_norm == "head":
            return rms_norm(q, q_norm, cfg), rms_norm(k, k_norm, cfg)
        parts = [(q, q_norm, 0), (k, self.shared.used(k_norm, self.head_dim), self.shared.copies)]
        q, k = norms_of_all_heads(parts, [cfg.n_heads, cfg.n_kv_heads], cfg, self.axes.tp)
        return q, k


class Rotation:
    """Rotary positions of one layer (arXiv 2104.09864).

    Of the first `rope_width` features of a head, feature i is paired with the one half that width later, as
    in published checkpoints; the others have no positions. With rope_interleaved features 2i and 2i + 1 are a
    pair, and come out as others do: alike in queries and keys, so that no score knows their order.
    """

    def __init__(self, cfg: LLMConfig, layer: int | None) -> None:
        theta, scaling = cfg.rope_of(layer)
        assert theta is not None
        self.width, self.interleaved = cfg.rope_width, cfg.rope_interleaved
        self.speeds = speeds(theta, self.width // 2, scaling)
        self.factor = attention_factor(scaling)
        self.original = (scaling and scaling.original) or 0
        self.axis = None if cfg.rope_axes is None else axis_of_pairs(cfg.rope_axes)

    def __call__(self, q: Tensor, k: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """q and k [T, H, D], turned by the positions of the T rows in their documents."""
        acc = accumulation_dtype(q.dtype)
        speed = to_device(self.speeds, q.device)
        if len(speed) > 1:
            # Of documents, not of batches: what is packed together changes nothing.
            whole = packing.whole if isinstance(packing, CachedPacking) else packing.lengths
            longer = np.asarray(whole, dtype=np.int64) > self.original
            speed = speed[to_device(longer.astype(np.int64), q.device)[packing.sequence_id]]
        # float64: in float32 the angle is off by 0.03 at 1M
        angle = self._position(packing) * speed
        cos, sin = ((f(angle) * self.factor).to(acc).unsqueeze(1) for f in (torch.cos, torch.sin))

        def turn(x: Tensor) -> Tensor:
            turned, rest = x[..., : self.width], x[..., self.width :]
            wide = turned.to(acc)
            low, high = (wide[..., 0::2], wide[..., 1::2]) if self.interleaved else wide.chunk(2, -1)
            y = torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
            return torch.cat([y, rest], -1) if rest.shape[-1] else y

        return turn(q), turn(k)

    def _position(self, packing: Packing) -> Tensor:
        """The position that each pair of features turns by: [T, 1], or [T, pairs] on several axes."""
        if self.axis is None or packing.places is None:
            return packing.position.unsqueeze(-1)
        return packing.places.index_select(0, to_device(self.axis, packing.places.device)).T
