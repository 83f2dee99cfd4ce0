"""Multi-head latent attention: keys and values of all heads come from one narrow latent of each token.

DeepSeek-V2 (arXiv 2405.04434, section 2.1) and V3 (arXiv 2412.19437, section 2.1.1). Heads over tp, tokens
over cp. Latents are computed from the tokens that a tp rank holds, and gathered narrow instead of the hidden
states; each rank then expands them for its own heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.attention import Heads, Rotation
from llm.cache import CachedPacking, KeyValues, attend_cached
from llm.config import LLMConfig
from llm.recompute import run
from parallel.context_parallel import ContextPacking, expanded_attention
from parallel.sequence.buckets import Limits
from parallel.sequence.packed import Packing, attention
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear, enter
from parallel.topology.axis import Axes

LATENT_EPS = 1e-6  # in norms of latents, whatever norm_eps is, as in the published code


class LatentAttention(Heads):
    """Causal attention within each document, by latents.

    With c = norm(kv_down x) [T, kv_rank] and a key k_r [T, rope_head_dim] that all heads share, beside it in
    kv_down: head h has the key [kv_up_h c, rotated k_r] and a value from kv_up_h c. Queries are q_up
    norm(q_down x), or q x without q_rank; their last rope_head_dim features are rotated.

    Generation keeps c and the rotated k_r of each token, kv_rank + rope_head_dim numbers, and reads them as
    one key and value of all heads: kv_up is applied to queries and results instead (section 2.1.2).
    layer: its index in the model, None in the block of multi-token prediction.
    """

    adapts = ("q_down", "kv_down")

    def __init__(
        self, cfg: LLMConfig, axes: Axes, layer: int | None = None, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        assert cfg.kv_rank is not None and cfg.rope_head_dim is not None
        self.cfg, self.axes = cfg, axes
        self.rope = Rotation(cfg, layer) if cfg.rope_of(layer)[0] is not None else None
        self.limits = Limits(cfg.window_of(layer), cfg.attention_cap)
        self.scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
        # Of a head: features of a key without positions and with them, and of a value.
        self.plain, self.turned, self.value = (
            cfg.head_dim - cfg.rope_head_dim,
            cfg.rope_head_dim,
            cfg.value_dim,
        )
        self.kept = cfg.kv_rank + self.turned
        # Under sequence parallelism each tp rank makes latents of other tokens.
        own = ParamSpec(normal(cfg.init_std), partial=axes.sequence_parallel)
        for name, width, normed in (("q", cfg.q_rank, cfg.q_rank), ("kv", self.kept, cfg.kv_rank)):
            if width is None or normed is None:
                continue
            declare(self, f"{name}_down", (width, cfg.d_model), own, **factory)
            if cfg.attention_bias:
                declare(self, f"{name}_down_bias", (width,), replace(own, init=constant(0.0)), **factory)
            declare(self, f"{name}_norm", (normed,), replace(own, init=constant(1.0)), **factory)
        init, queries = normal(cfg.init_std), cfg.n_heads * cfg.head_dim
        if cfg.q_rank is None:
            self.q = Linear(cfg.d_model, queries, init, shard="column", **factory)
        else:
            self.q_up = Linear(cfg.q_rank, queries, init, shard="column", **factory)
        both = cfg.n_heads * (self.plain + self.value)
        self.kv_up = Linear(cfg.kv_rank, both, init, shard="column", **factory)
        self.add_output(cfg, cfg.n_heads * self.value, **factory)
        self.recompute: frozenset[str] = frozenset()

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        latents = enter(self._latents(x), self.axes)  # [T, q_rank + kept]
        q_latent, kept = torch.split(latents, [latents.shape[1] - self.kept, self.kept], -1)
        q: Tensor = self.q(enter(x, self.axes)) if self.cfg.q_rank is None else self.q_up(q_latent)
        y = run("attention_core" in self.recompute, self._core, q, kept, packing)
        return self.output(y)

    def _latents(self, x: Tensor) -> Tensor:
        """Normed latents of queries, if there are any, those of keys and values, and the shared key, not yet
        rotated: [T, q_rank + kv_rank + rope_head_dim] of x [T, d]."""
        names = ["kv"] if self.cfg.q_rank is None else ["q", "kv"]
        biases = None
        if self.cfg.attention_bias:
            biases = [local(getattr(self, f"{name}_down_bias")) for name in names]
        down = joined_linear(x, [adapted(self, f"{name}_down") for name in names], biases)
        out, at = [], 0
        for name in names:
            weight = local(getattr(self, f"{name}_norm"))
            acc = accumulation_dtype(x.dtype)
            part = down[:, at : at + len(weight)]
            out.append(F.rms_norm(part.to(acc), weight.shape, weight.to(acc), LATENT_EPS).to(x.dtype))
            at += len(weight)
        return torch.cat([*out, down[:, at:]], -1)

    def _core(self, q: Tensor, kept: Tensor, packing: Packing) -> Tensor:
        """Queries [T, h * head_dim] of the h heads here, and rows [T, kept], to results [T, h, value]."""
        heads = torch.unflatten(q, -1, (-1, self.cfg.head_dim))
        plain, turned = torch.split(heads, [self.plain, self.turned], -1)
        latent, key = torch.split(kept.unsqueeze(1), [self.kept - self.turned, self.turned], -1)
        if self.rope is not None:
            turned, key = self.rope(turned, key, packing)
        if isinstance(packing, CachedPacking):
            row = torch.cat([latent, key], -1)  # [T, 1, kept]
            before = packing.keep(self, row, row[..., :0])  # values are part of what is kept as keys
            if not packing.begins:
                return self._absorbed(plain, turned, before.k, packing)
        rows = torch.cat([latent, key], -1).squeeze(1)
        q = self._filled(torch.cat([plain, turned], -1))
        if isinstance(packing, ContextPacking):
            y = expanded_attention(q, rows, self._expand, packing, scale=self.scale, limits=self.limits)
        else:
            assert self.axes.cp.size == 1, "under cp a layer needs the packing of context_parallel.pack()"
            k, v = self._expand(rows)
            y = attention(q, k, v, packing, causal=True, scale=self.scale, limits=self.limits)
        return y[..., : self.value]

    def _filled(self, x: Tensor) -> Tensor:
        """x with zeros behind: kernels want one width of keys and values. They change no score, no value."""
        return F.pad(x, (0, max(self.cfg.head_dim, self.value) - x.shape[-1]))

    def _expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, kept], keys turned, to keys and values [n, h, the wider of both]."""
        latent, key = torch.split(rows, [self.kept - self.turned, self.turned], -1)
        both = torch.unflatten(self.kv_up(latent), -1, (-1, self.plain + self.value))
        k, v = torch.split(both, [self.plain, self.value], -1)
        k = torch.cat([k, key.unsqueeze(1).expand(-1, k.shape[1], -1)], -1)
        return self._filled(k), self._filled(v)

    def _absorbed(self, plain: Tensor, turned: Tensor, rows: Tensor, packing: CachedPacking) -> Tensor:
        """One token a document, plain [B, h, plain] and turned [B, h, turned], to the rows [B, S, 1, kept]
        up to it: [B, h, value]. No key or value of a head is made."""
        up = torch.unflatten(adapted(self.kv_up, "weight"), 0, (-1, self.plain + self.value))
        key, value = torch.split(up, [self.plain, self.value], 1)  # [h, ., kv_rank]
        q = torch.cat([torch.einsum("bhn,hnr->bhr", plain, key), turned], -1)
        kept = KeyValues(rows, rows[..., : key.shape[-1]])
        y = attend_cached(q, kept, packing.position, scale=self.scale, limits=self.limits)
        return torch.einsum("bhr,hvr->bhv", y, value)
