"""Mixture of experts: router with a selection bias, routed experts in full or latent width, a shared one.

Nemotron 3 and DeepSeek-V3 routing (arXiv 2512.20848; 2412.19437, section 2.1.2): experts are chosen by score
plus bias and weighted by score alone. The bias follows the load once a global batch and replaces a balance
loss; a small balance loss within each document and a z-loss can be added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.balance import attach, choose, document_loads, sequence_loss, z_loss
from llm.config import LLMConfig
from llm.counts import Counts
from llm.mlp import MLP, activate, config_mlp
from llm.recompute import run
from parallel.comm.collectives import join_tokens, split_tokens
from parallel.expert_parallel.all_gather import GatherRoute, gather_combine, gather_dispatch, plan_gather
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.expert_tensor import gather_rows, reduce_rows
from parallel.expert_parallel.grouped import ExpertRows, grouped_linear
from parallel.expert_parallel.routing import (
    Route,
    Table,
    capacity_rows,
    exchange_tokens,
    plan_route,
    tally,
    within_capacity,
)
from parallel.sequence.packed import Packing
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import ParamSpec, constant, declare, declare_buffer, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes, Axis


class Router(nn.Module):
    """Logits [n, E] of tokens [n, d]: a linear map in float32 (float64), whatever the rest computes in."""

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        # Each tp rank routes its own share of the tokens, so its gradient is a partial sum.
        spec = ParamSpec(normal(cfg.init_std), partial=axes.tp.size > 1, precise=True, matrix=False)
        declare(self, "weight", (cfg.n_experts, cfg.d_model), spec, **factory)
        if cfg.moe_bias:
            declare(self, "bias", (cfg.n_experts,), replace(spec, init=constant(0.0)), **factory)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        bias = None if self.bias is None else local(self.bias).to(acc)
        return F.linear(x.to(acc), local(self.weight).to(acc), bias)


class Experts(nn.Module):
    """The routed experts of this rank: up (and gate) [E, F, w], an activation, down [E, w, F].

    Under etp a rank holds some of the F features; its result is a partial sum, to which it adds some of the
    w features of the bias of down.
    """

    def __init__(self, cfg: LLMConfig, etp: Axis, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.cfg, self.etp = cfg, etp
        e, f, w = cfg.n_experts, cfg.expert_ffn, cfg.expert_width
        up = ParamSpec(normal(cfg.init_std), shard_dim=0, view="expert", etp_dim=1)
        declare(self, "up", (e, f, w), up, **factory)
        if cfg.mlp_gated:
            declare(self, "gate", (e, f, w), up, **factory)
        declare(self, "down", (e, w, f), replace(up, init=normal(cfg.out_std), etp_dim=2), **factory)
        biased = {"up": f, "gate": f, "down": w} if cfg.moe_bias else {}
        for name, width in biased.items():
            if name != "gate" or cfg.mlp_gated:
                declare(self, f"{name}_bias", (e, width), replace(up, init=constant(0.0)), **factory)

    def forward(self, rows: Tensor, experts: ExpertRows, recompute: bool = False) -> Tensor:
        """Rows [m, w], grouped by local expert, to their results [m, w].

        recompute: keep the inputs of the activation for the backward, not its result.
        """

        expert: Tensor | None = None
        if self.cfg.moe_bias:
            at = torch.arange(len(rows), device=rows.device)
            expert = torch.bucketize(at, experts.ends, right=True)  # of each row

        def act_down(up: Tensor, gate: Tensor | None) -> Tensor:
            hidden = activate(self.cfg.activation, up, gate)
            y = grouped_linear(hidden, local(self.down), experts)
            if expert is None:
                return y
            own = local(self.down_bias).index_select(0, expert)
            before = self.etp.rank * own.shape[1]
            return y + F.pad(own, (before, y.shape[1] - before - own.shape[1]))

        def inner(name: str) -> Tensor:
            y = grouped_linear(rows, local(getattr(self, name)), experts)
            return y if expert is None else y + local(getattr(self, f"{name}_bias")).index_select(0, expert)

        return run(recompute, act_down, inner("up"), inner("gate") if self.cfg.mlp_gated else None)


@dataclass
class Choice:
    """The experts of each token, chosen once a forward.

    A layer that is computed again for its backward reads them here: rounding could make it choose others, and
    the exchange of sizes is saved.
    """

    chosen: Tensor | None = None
    """Experts [n, k] of this rank's tokens."""
    loads: Tensor | None = None
    """document_loads(), where a balance loss needs them."""
    route: Route | GatherRoute | None = None
    """How rows reach their experts."""


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass gives its layers besides the hidden states."""

    packing: Packing
    """The documents."""
    n_real: int
    """Tokens of this rank before the padding."""
    counts: Counts = field(default_factory=Counts)
    """Numbers of tokens that the objectives are means over."""
    routed: Table | None = None
    """LLMBatch.routed."""
    learns: bool = False
    """Whether this is a training forward: it counts loads and adds the router's objectives."""


class MoE(nn.Module):
    """Routed experts over ep plus a shared expert over tp.

    Each tp rank routes a share of the tokens of its own (the one it holds under sequence parallelism), so the
    expert axis may cross tp and dp. Padding tokens, the last of the sequence, are neither routed nor counted.
    With a latent width, rows are projected to it before dispatch and back after combine, so both exchanges
    move latent rows (LatentMoE, arXiv 2601.18089).
    """

    expert_bias: Tensor
    load: Tensor
    objectives: Tensor

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.cfg, self.axes = cfg, axes
        self.router = Router(cfg, axes, **factory)
        self.experts = Experts(cfg, axes.etp, **factory)
        self.latent_in: Linear | None = None
        self.latent_out: Linear | None = None
        if cfg.latent is not None:
            # Each tp rank holds them whole and applies them to its own tokens.
            partial = axes.tp.size > 1
            self.latent_in = Linear(cfg.d_model, cfg.latent, normal(cfg.init_std), partial=partial, **factory)
            self.latent_out = Linear(cfg.latent, cfg.d_model, normal(cfg.out_std), partial=partial, **factory)
        self.shared: MLP | None = None
        if cfg.shared_ffn:
            self.shared = config_mlp(cfg, cfg.shared_ffn, axes, **factory)
        device, dtype = factory.get("device"), factory.get("dtype")
        acc = torch.float32 if dtype is None else accumulation_dtype(dtype)
        declare_buffer(self, "expert_bias", (cfg.n_experts,), 0.0, device=device, dtype=acc)
        # Tokens of this rank that chose each expert since the last update of the bias.
        experts = (cfg.n_experts,)
        declare_buffer(self, "load", experts, 0, persistent=False, device=device, dtype=torch.int64)
        # This rank's parts of the mean balance loss and z-loss, unweighted, since LLM.take_objectives().
        declare_buffer(self, "objectives", (2,), 0.0, persistent=False, device=device, dtype=acc)
        self.recompute: frozenset[str] = frozenset()

    def forward(self, x: Tensor, ctx: ForwardContext, choice: Choice | None = None) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same.

        choice: filled where it is empty, followed where it is not.
        """
        choice = choice or Choice()
        tp, cfg = self.axes.tp, self.cfg
        share = x if self.axes.sequence_parallel else split_tokens(x, tp)
        width = share.shape[0]
        real = min(max(ctx.n_real - tp.rank * width, 0), width)
        tokens = share[:real]
        logits = self.router(tokens)
        score = torch.sigmoid(logits) if cfg.router == "sigmoid" else torch.softmax(logits, -1)
        first = choice.chosen is None
        if choice.chosen is None or choice.route is None:
            biased = score.detach() + self.expert_bias
            choice.chosen = choose(biased, cfg.top_k, cfg.expert_groups, cfg.top_groups)
            choice.route = self._plan(choice.chosen, score, ctx.routed)
            if ctx.learns:
                self.load += tally(choice.chosen, cfg.n_experts)
        weight = score.gather(1, choice.chosen)
        if cfg.norm_top_k:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        if ctx.learns:
            weight = self._with_objectives(weight, logits, score, ctx, choice, first)
        rows = tokens if self.latent_in is None else self.latent_in(tokens)
        y = self._routed(rows, weight * cfg.routed_scale, choice.route)
        if self.latent_out is not None:
            y = self.latent_out(y)
        y = F.pad(y, (0, 0, 0, width - real))
        if not self.axes.sequence_parallel:
            y = join_tokens(y, tp)
        return y if self.shared is None else y + run("mlp" in self.recompute, self.shared, x)

    def _plan(self, chosen: Tensor, score: Tensor, routed: Table | None) -> Route | GatherRoute:
        cfg, ep, etp = self.cfg, self.axes.ep, self.axes.etp
        gathers = cfg.dispatcher == "all_gather" and ep.size > 1
        keep = pad = None
        if routed is None and (gathers or cfg.pad_experts):
            routed = exchange_tokens(len(chosen), ep, etp, chosen.device)
        if cfg.capacity is not None:
            rows = capacity_rows(chosen.numel(), cfg.n_experts, cfg.capacity)
            keep = within_capacity(chosen, score.gather(1, chosen), cfg.n_experts, rows)
        if gathers:
            assert routed is not None
            return plan_gather(chosen, cfg.n_experts, ep, routed[etp.rank], etp=etp, keep=keep)
        if cfg.pad_experts:
            assert routed is not None and cfg.capacity is not None
            assert routed[etp.rank][ep.rank] == len(chosen), (routed, len(chosen))
            pad = [[capacity_rows(n * cfg.top_k, cfg.n_experts, cfg.capacity) for n in r] for r in routed]
        return plan_route(chosen, cfg.n_experts, ep, etp=etp, keep=keep, pad=pad)

    def _routed(self, x: Tensor, weight: Tensor, route: Route | GatherRoute) -> Tensor:
        """Rows x [n, w] through their experts; the results summed with weights [n, k]: [n, w]."""
        if isinstance(route, GatherRoute):
            return gather_combine(self._expert_rows(gather_dispatch(x, route), route), weight, route)
        return combine(self._expert_rows(dispatch(x, route), route), weight, route)

    def _expert_rows(self, rows: Tensor, route: Route | GatherRoute) -> Tensor:
        """Rows [m, w] grouped by local expert to their results [m, w]."""
        again, etp = "moe_act" in self.recompute, route.etp
        if etp is None:
            whole: Tensor = self.experts(rows, route.experts, again)
            return whole
        return reduce_rows(self.experts(gather_rows(rows, etp), etp.experts, again), etp)

    def _with_objectives(
        self, weight: Tensor, logits: Tensor, score: Tensor, ctx: ForwardContext, choice: Choice, first: bool
    ) -> Tensor:
        """The routing weights, whose backward adds the router's own objectives."""
        cfg = self.cfg
        balance = z = score.new_zeros(())
        if cfg.aux_weight:
            balance = self._balance(score, ctx, choice) * ctx.counts.token_scale
            weight = attach(weight, balance, cfg.aux_weight)
        if cfg.z_weight:
            z = z_loss(logits) * ctx.counts.token_scale
            weight = attach(weight, z, cfg.z_weight)
        if first:
            self.objectives += torch.stack([balance, z]).detach()
        return weight

    def _balance(self, score: Tensor, ctx: ForwardContext, choice: Choice) -> Tensor:
        """This rank's part of the balance losses of all documents; score [n, E]: of its tokens."""
        tp = self.axes.tp
        at = tp.rank * (ctx.packing.total // tp.size)
        document = ctx.packing.sequence_id[at : at + len(score)]
        if choice.loads is None:
            documents, over = len(ctx.packing.lengths), [tp, self.axes.cp]
            # By score alone (equation 18): bias and groups correct what the router still has to learn.
            best = choose(score.detach(), self.cfg.top_k)
            choice.loads = document_loads(best, document, documents, self.cfg.n_experts, over)
        return sequence_loss(score / (score.sum(-1, keepdim=True) + 1e-20), choice.loads, document)

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Raise the bias of experts below the mean of the global `load` [E], lower others'; reset counts."""
        # The sign of mean - load, from whole numbers: both times E.
        below = torch.sign(load.sum() - load * self.cfg.n_experts)
        self.expert_bias += self.cfg.expert_bias_rate * below.to(self.expert_bias.dtype)
        self.load.zero_()
