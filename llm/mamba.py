"""The Mamba-2 mixer with Nemotron-H semantics, cut over tp by heads and groups.

Every projection is a parameter of its own, so that each is cut evenly; they are joined into one product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.norm import wide
from llm.scan import scan
from parallel.axis import Axes
from parallel.packed import Packing, depthwise_conv
from parallel.param import Init, constant, declare, local, normal, uniform
from parallel.tensor import Linear, enter, leave


def _log_uniform_a() -> Init:
    """A_log with A uniform in (1, 16)."""
    return Init(lambda u, v: torch.log(1.0 + 15.0 * u))


def _time_step_bias() -> Init:
    """Inverse softplus of a time step, log-uniform in (1e-3, 1e-1), at least 1e-4."""
    low, high = math.log(1e-3), math.log(1e-1)

    def draw(u: Tensor, v: Tensor) -> Tensor:
        dt = torch.exp(low + (high - low) * u).clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))

    return Init(draw)


class ScanScalars(nn.Module):
    """A_log, D and dt_bias, one each a head; kept precise whatever the rest computes in."""

    def __init__(self, heads: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        inits = {"a_log": _log_uniform_a(), "d": constant(1.0), "dt_bias": _time_step_bias()}
        for name, init in inits.items():
            declare(self, name, (heads,), init, shard_dim=0, precise=True, device=device, dtype=dtype)

    def forward(self, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A (negative), D and dt_bias of the local heads, in dtype acc."""
        return (
            -local(self.a_log).to(acc).exp(),
            local(self.d).to(acc),
            local(self.dt_bias).to(acc),
        )


class Mamba(nn.Module):
    """[z, x, B, C, dt] = W x; x, B, C through a causal convolution and SiLU; scan; gated group norm; out."""

    def __init__(
        self, cfg: LLMConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.cfg, self.axes = cfg, axes
        tp = axes.tp.size
        self.heads, self.groups = cfg.mamba_heads // tp, cfg.mamba_groups // tp
        inner, bc = cfg.mamba_inner, cfg.mamba_groups * cfg.mamba_state
        self.sizes = [n // tp for n in (inner, inner, bc, bc, cfg.mamba_heads)]
        kw: dict[str, Any] = {"shard_dim": 0, "device": device, "dtype": dtype}
        widths = {"z": inner, "x": inner, "b": bc, "c": bc, "dt": cfg.mamba_heads}
        for name, width in widths.items():
            declare(self, f"in_{name}", (width, cfg.d_model), normal(cfg.init_std), **kw)
        bound = 1.0 / math.sqrt(cfg.conv_kernel)  # kaiming uniform with a = sqrt(5)
        for name in ("x", "b", "c"):
            declare(self, f"conv_{name}", (widths[name], cfg.conv_kernel), uniform(-bound, bound), **kw)
            declare(self, f"conv_bias_{name}", (widths[name],), uniform(-bound, bound), **kw)
        declare(self, "norm", (inner,), constant(1.0), **kw)
        self.scalars = ScanScalars(cfg.mamba_heads, device=device, dtype=dtype)
        self.out = Linear(inner, cfg.d_model, normal(cfg.out_std), shard="row", device=device, dtype=dtype)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        cfg = self.cfg
        x = enter(x, self.axes)
        weights = [local(getattr(self, f"in_{n}")) for n in ("z", "x", "b", "c", "dt")]
        z, mixed, dt = F.linear(x, torch.cat(weights)).split(
            [self.sizes[0], sum(self.sizes[1:4]), self.sizes[4]], dim=-1
        )
        kernel = torch.cat([local(getattr(self, f"conv_{n}")) for n in ("x", "b", "c")])
        bias = torch.cat([local(getattr(self, f"conv_bias_{n}")) for n in ("x", "b", "c")])
        acc = wide(x.dtype)
        mixed = F.silu(depthwise_conv(mixed, kernel, bias, packing, causal=True)).to(acc)
        u, b, c = mixed.split(self.sizes[1:4], dim=-1)
        a, d, dt_bias = self.scalars(acc)
        dt = F.softplus(dt.to(acc) + dt_bias)
        u = u.view(-1, self.heads, cfg.mamba_head_dim)
        b = b.view(-1, self.groups, cfg.mamba_state)
        c = c.view(-1, self.groups, cfg.mamba_state)
        y = scan(u, dt, a, b, c, packing.sequence_id, cfg.chunk) + u * d.unsqueeze(-1)
        y = y.reshape(-1, self.groups, self.sizes[0] // self.groups)
        gate = F.silu(z.to(acc)).view_as(y)
        # Groups of the norm are those of the scan, so tp never cuts through one.
        y = F.rms_norm(y * gate, y.shape[-1:], None, cfg.norm_eps).flatten(1)
        y = (y * local(self.norm).to(acc)).to(x.dtype)
        return leave(self.out(y), self.axes)
