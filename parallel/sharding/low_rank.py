"""Low-rank adapters (LoRA, arXiv 2106.09685): a linear map W becomes W + alpha / rank * B A, with W frozen.

A [rank, d_in] and B [d_out, rank] are parameters next to W, declared so that every layout learns the same: A
is sharded where W's input is, B where its output is. The one that tp does not shard gets a part of its
gradient on each tp rank, which the optimizer sums once a step.

The sum is made where W is used. Its cost is that of B A, rank / tokens of the product with W itself. It is
rounded to the dtype that W is gathered in, as weights that are trained themselves are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from parallel.sharding.param import ParamSpec, constant, declare, local, own_specs, uniform

A, B = "_lora_a", "_lora_b"  # after the name of the weight
ALL = "all-linear"


@dataclass(frozen=True)
class LowRank:
    """rank: of B A. alpha: its weight times the rank. targets: patterns of linear maps (matching())."""

    rank: int
    alpha: float
    targets: Sequence[str]

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank


def linear_maps(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By name, the linear maps that can have adapters: their module, and the name of the weight in it.

    A module lists the names of its weights that it reads with adapted() in its attribute `adapts`.
    """
    out = {}
    for prefix, sub in module.named_modules():
        for name in getattr(sub, "adapts", ()):
            if name in own_specs(sub):
                parts = [p for p in (prefix, name) if p and p != "weight"]
                out[".".join(parts)] = sub, name
    return out


def matching(names: Sequence[str], targets: Sequence[str]) -> dict[str, list[str]]:
    """By target, the names that it is, or that end with it after a dot; "all-linear" is all of them. A target
    may have wildcards (*, ?, [..])."""

    def fits(name: str, target: str) -> bool:
        return target == ALL or fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")

    return {target: [name for name in names if fits(name, target)] for target in targets}


def add_adapters(module: nn.Module, low: LowRank) -> None:
    """Freeze `module`, which is not sharded yet, and declare trained adapters next to its targets.

    A starts uniform in 1 / sqrt(d_in) as peft's does, and B at zero, so the module computes what it did.
    """
    module.requires_grad_(False)
    found = linear_maps(module)
    for name in dict.fromkeys(n for some in matching([*found], low.targets).values() for n in some):
        sub, weight = found[name]
        param, spec = getattr(sub, weight), own_specs(sub)[weight]
        assert spec.view == "dense" and param.ndim == 2, name
        (d_out, d_in), dim, bound = param.shape, spec.shard_dim, param.shape[1] ** -0.5
        factory = {"device": param.device, "dtype": param.dtype}
        of_a = _next_to(spec, None if dim == 0 else dim, partial=dim == 0)
        of_b = _next_to(spec, None if dim == 1 else dim, partial=dim == 1)
        declare(sub, weight + A, (low.rank, d_in), replace(of_a, init=uniform(-bound, bound)), **factory)
        declare(sub, weight + B, (d_out, low.rank), replace(of_b, init=constant(0.0)), **factory)
        sub.__dict__["_low_rank"] = low.scale


def _next_to(spec: ParamSpec, shard_dim: int | None, *, partial: bool) -> ParamSpec:
    return replace(spec, shard_dim=shard_dim, partial=spec.partial or partial, trained=True)


def adapted(module: nn.Module, name: str) -> Tensor:
    """This rank's shard of a weight, with its adapter where it has one; differentiable."""
    weight = local(getattr(module, name))
    a = module._parameters.get(name + A)
    if a is None:
        return weight
    b = module._parameters[name + B]
    assert b is not None
    return torch.addmm(weight, local(b), local(a), alpha=module.__dict__["_low_rank"])


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith((A, B))


def adapters_of(name: str) -> tuple[str, str]:
    """The names of A and B next to the weight `name`."""
    return name + A, name + B
