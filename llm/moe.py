"""Mixture of experts: sigmoid router with a selection bias, dropless experts, one shared expert.

Nemotron 3 and DeepSeek-V3 routing (arXiv 2512.20848; 2412.19437, section 2.1.2): experts are chosen by score
plus bias, weighted by score alone. The bias follows the load, once a global batch, instead of a loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.mlp import MLP
from llm.norm import wide
from parallel.axis import Axes
from parallel.collectives import join_tokens, split_tokens
from parallel.expert import combine, dispatch, grouped_linear, plan_route
from parallel.param import declare, local, normal


class Router(nn.Module):
    """Scores [n, E] in float32 (float64): sigmoid of a linear map, whatever the rest computes in."""

    def __init__(
        self, cfg: LLMConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        shape = (cfg.n_experts, cfg.d_model)
        # Each tp rank routes its own share of the tokens, so its gradient is a part of the whole.
        partial = axes.tp.size > 1
        declare(
            self,
            "weight",
            shape,
            normal(cfg.init_std),
            partial=partial,
            precise=True,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        acc = wide(x.dtype)
        return torch.sigmoid(F.linear(x.to(acc), local(self.weight).to(acc)))


class Experts(nn.Module):
    """The routed experts of this rank: squared ReLU between up [E, F, d] and down [E, d, F]."""

    def __init__(
        self, cfg: LLMConfig, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        e, f, d = cfg.n_experts, cfg.expert_ffn, cfg.d_model
        kw: dict[str, Any] = {"view": "expert", "shard_dim": 0, "device": device, "dtype": dtype}
        declare(self, "up", (e, f, d), normal(cfg.init_std), **kw)
        declare(self, "down", (e, d, f), normal(cfg.out_std), **kw)

    def forward(self, rows: Tensor, per_expert: list[int]) -> Tensor:
        hidden = F.relu(grouped_linear(rows, local(self.up), per_expert)).square()
        return grouped_linear(hidden, local(self.down), per_expert)


class MoE(nn.Module):
    """Routed experts over ep plus a shared expert over tp.

    Each tp rank routes a distinct share of the tokens (its own with sequence parallelism), so the expert axis
    may cross tp and dp. Padding tokens, the last of the sequence, are neither routed nor counted.
    """

    expert_bias: Tensor
    load: Tensor

    def __init__(
        self, cfg: LLMConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.cfg, self.axes = cfg, axes
        self.router = Router(cfg, axes, device=device, dtype=dtype)
        self.experts = Experts(cfg, device=device, dtype=dtype)
        self.shared = MLP(
            cfg.d_model,
            cfg.shared_ffn,
            axes,
            std=cfg.init_std,
            out_std=cfg.out_std,
            device=device,
            dtype=dtype,
        )
        acc = torch.float32 if dtype is None else wide(dtype)
        self.register_buffer("expert_bias", torch.zeros(cfg.n_experts, dtype=acc, device=device))
        # Tokens each expert got since the last update of the bias, on this rank.
        self.register_buffer(
            "load", torch.zeros(cfg.n_experts, dtype=torch.int64, device=device), persistent=False
        )
        self.latest: Tensor | None = None

    def forward(self, x: Tensor, n_real: int) -> Tensor:
        tp = self.axes.tp
        share = x if self.axes.sequence_parallel else split_tokens(x, tp)
        width = share.shape[0]
        real = min(max(n_real - tp.rank * width, 0), width)
        tokens = share[:real]
        score = self.router(tokens)
        chosen = choose(score.detach() + self.expert_bias, self.cfg.top_k)
        # Replaced, not added to: a recomputed layer comes through here twice for the same tokens.
        self.latest = torch.bincount(chosen.reshape(-1), minlength=self.cfg.n_experts)
        weight = score.gather(1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * self.cfg.routed_scale
        route = plan_route(chosen, self.cfg.n_experts, self.axes.ep)
        y = combine(self.experts(dispatch(tokens, route), route.per_expert), weight, route)
        y = F.pad(y, (0, 0, 0, width - real))
        if not self.axes.sequence_parallel:
            y = join_tokens(y, tp)
        return y + self.shared(x)

    def count(self) -> None:
        """Add the tokens of the latest forward to the load."""
        assert self.latest is not None
        self.load += self.latest

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Move the bias towards experts below the mean of the global `load` [E]; forget the counts."""
        # mean - load, times E so that whole numbers decide the sign.
        below = torch.sign(load.sum() - load * self.cfg.n_experts)
        self.expert_bias += self.cfg.expert_bias_rate * below
        self.load.zero_()


def choose(score: Tensor, k: int) -> Tensor:
    """The k best columns of each row [n, k]; of equal scores the lowest index comes first."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]
