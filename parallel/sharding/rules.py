"""Update rules over the local shards of parameters: AdamW, with moments of its own dtype if asked.

Muon, for matrices, is in muon.py. The update runs on plain local tensors: dispatching every elementwise
operation through DTensors costs more than the update itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.sharding.param import ParamSpec


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    betas: decay rates of the first and the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, times the learning rate. Vectors and scalars do not decay.
    moments: dtype that both moments are kept in; None: that of the parameter. They are updated in the
        parameter's. bfloat16 has 8 bits: a second moment whose beta is above 0.99 would hardly move.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: torch.dtype | None = None


@dataclass(frozen=True)
class Muon:
    """Hyper-parameters of Muon (Jordan et al. 2024; arXiv 2502.16982): for matrices the momentum's nearest
    orthogonal matrix, for all else AdamW.

    momentum: decay rate of the momentum, which enters as Nesterov's.
    steps: of the Newton-Schulz iteration.
    rest: of the other parameters. Its weight decay is that of matrices too.
    """

    momentum: float = 0.95
    steps: int = 5
    rest: AdamW = field(default_factory=AdamW)


@dataclass(frozen=True)
class Shard:
    """One parameter as an update rule sees it.

    name: full name in the module.
    param: the module's parameter, a DTensor where it is sharded.
    local: this rank's shard as a plain parameter, sharing memory with `param`.
    spec: its declaration.
    rate: factor on the learning rate.
    """

    name: str
    param: nn.Parameter
    local: nn.Parameter
    spec: ParamSpec
    rate: float


class Rule(Protocol):
    """Updates some parameters from the gradients of their local shards."""

    def step(self, lr: float) -> None:
        """One update; parameters without a gradient stay as they are, and so does their state."""

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """By parameter and key, this rank's shards; what does not exist yet is made, as zeros."""


class FusedAdamW:
    """AdamW in one fused call; state in the dtype of the parameter."""

    def __init__(self, shards: Sequence[Shard], hyper: AdamW) -> None:
        self.shards = shards
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for s in shards:
            groups.setdefault((s.rate, s.param.ndim > 1), []).append(s.local)
        self.rates = [rate for rate, _ in groups]
        self.adam = torch.optim.AdamW(
            [
                {"params": params, "weight_decay": hyper.weight_decay if decays else 0.0}
                for (_, decays), params in groups.items()
            ],
            lr=0.0,
            betas=hyper.betas,
            eps=hyper.eps,
            fused=True,
        )

    def step(self, lr: float) -> None:
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.adam.step()

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        for s in self.shards:
            if not self.adam.state[s.local]:
                self.adam.state[s.local] |= _zeros(s.local, s.local.dtype)
        return {s.name: self.adam.state[s.local] for s in self.shards}


class StoredAdamW:
    """AdamW whose moments are kept in another dtype than the parameter's, and updated in the parameter's."""

    def __init__(self, shards: Sequence[Shard], hyper: AdamW, moments: torch.dtype) -> None:
        self.shards, self.hyper, self.moments = shards, hyper, moments
        self.kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        (b1, b2), eps, decay = self.hyper.betas, self.hyper.eps, self.hyper.weight_decay
        for s in self.shards:
            if s.local.grad is None:
                continue
            kept, rate = self._of(s), lr * s.rate
            kept["step"] += 1
            # The correction of the moments' start is a factor that stays on the device.
            one, two = 1 - b1 ** kept["step"], (1 - b2 ** kept["step"]).sqrt()
            grad = s.local.grad
            first = kept["exp_avg"].to(grad.dtype, copy=True).lerp_(grad, 1 - b1)
            second = kept["exp_avg_sq"].to(grad.dtype, copy=True).mul_(b2).addcmul_(grad, grad, value=1 - b2)
            kept["exp_avg"].copy_(first)
            kept["exp_avg_sq"].copy_(second)
            if s.param.ndim > 1:
                s.local.mul_(1 - rate * decay)
            s.local.sub_(first.div_(second.sqrt_().div_(two).add_(eps)).mul_(rate / one))

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {s.name: self._of(s) for s in self.shards}

    def _of(self, s: Shard) -> dict[str, Tensor]:
        if s.name not in self.kept:
            self.kept[s.name] = _zeros(s.local, self.moments)
        return self.kept[s.name]


def _zeros(like: Tensor, moments: torch.dtype) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=like.device),
        "exp_avg": torch.zeros_like(like, dtype=moments),
        "exp_avg_sq": torch.zeros_like(like, dtype=moments),
    }


def adam_rule(shards: Sequence[Shard], hyper: AdamW) -> Rule:
    """AdamW of some parameters."""
    if hyper.moments is None or all(s.local.dtype == hyper.moments for s in shards):
        return FusedAdamW(shards, hyper)
    return StoredAdamW(shards, hyper, hyper.moments)


Rates = Callable[[str], float]  # by parameter, a factor on the learning rate
