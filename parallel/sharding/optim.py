"""AdamW over the local shards of sharded modules, and the true global gradient norm.

The update runs on plain local tensors in one fused call; DTensors appear only at the edges (checkpoint,
global shapes), because dispatching every elementwise update through them costs more than the update.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.sharding.param import declared, local
from parallel.sharding.shard import model_cuts
from parallel.topology.mesh import ModuleMesh


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters (Loshchilov and Hutter, arXiv 1711.05101). Weight decay spares vectors and scalars."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class _Shard:
    """One parameter as the optimizer sees it: `weight` is 1 / number of ranks that hold the same elements;
    partial: its gradient is summed over tp; shared: over the first and the last pipeline rank; scalar: over
    the ranks that FSDP shards the others over."""

    name: str
    param: nn.Parameter
    local: nn.Parameter
    weight: float
    partial: bool
    shared: bool
    scalar: bool


class ShardedOptimizer:
    """Optimizer of the parts of one module on this rank; state is sharded exactly as the parameters are.

    parts: its pipeline stages here, which name parameters as the whole module does. shared: parameters that
    the first and the last stage both hold, with equal values: they get the sum of their gradients.
    Call order of a step: collect(), norm_squared() (summed over the job by the caller), scale(), step().
    A parameter without gradient (its module was skipped for the whole step) keeps value and state.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        mesh: ModuleMesh,
        hyper: AdamW,
        *,
        shared: Collection[str] = (),
    ) -> None:
        self.mesh = mesh
        self.shards: list[_Shard] = []
        for name, param, spec in (entry for part in parts for entry in declared(part)):
            if not param.requires_grad:
                continue
            replicas = mesh.axes.tp.size if spec.view == "dense" and not model_cuts(spec, mesh) else 1
            partial, twice = spec.partial and replicas > 1, name in shared
            data = local(param.detach())
            copies = mesh.data.size() if not param.ndim else 1
            weight = 1.0 / (replicas * copies * (2 if twice else 1))
            shard = _Shard(name, param, nn.Parameter(data), weight, partial, twice, not param.ndim)
            self.shards.append(shard)
        assert mesh.ends is not None or not any(s.shared for s in self.shards), "the mesh must tie its ends"
        decay = [s.local for s in self.shards if s.param.ndim > 1]
        plain = [s.local for s in self.shards if s.param.ndim <= 1]
        groups = [
            {"params": decay, "weight_decay": hyper.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self.adam = (
            torch.optim.AdamW(groups, lr=0.0, betas=hyper.betas, eps=hyper.eps, fused=True)
            if groups
            else None
        )

    @torch.no_grad()
    def collect(self) -> None:
        """Bring the gradients onto the local shards; sum those of scalars over the data, those that are
        partial over tp, and those of weights that both ends of the pipeline hold, in one message each."""
        for s in self.shards:
            s.local.grad = None if s.param.grad is None else local(s.param.grad)
        data = self.mesh.data
        _sum([s for s in self.shards if s.scalar], data.get_group() if data.size() > 1 else None)
        # By declaration, not by presence: whether a module ran in a step is the same on all its ranks.
        _sum([s for s in self.shards if s.partial], self.mesh.axes.tp.group)
        _sum([s for s in self.shards if s.shared], self.mesh.ends)

    @torch.no_grad()
    def norm_squared(self) -> float:
        """This rank's share of the squared gradient norm: summed over the module's ranks it is the true one.

        Replicated parameters count once. Not finite where any gradient here is not.
        """
        pairs = [(s.local.grad, s.weight) for s in self.shards if s.local.grad is not None]
        if not pairs:
            return 0.0
        norms = torch.stack(torch._foreach_norm([g for g, _ in pairs])).to(torch.float64)
        weights = torch.tensor([w for _, w in pairs], dtype=torch.float64, device=norms.device)
        return float((norms.square() * weights).sum())

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every gradient, for clipping."""
        grads = [s.local.grad for s in self.shards if s.local.grad is not None]
        if grads and factor != 1.0:
            torch._foreach_mul_(grads, factor)

    def step(self, lr: float) -> None:
        """Update with learning rate `lr` and drop the gradients."""
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        for s in self.shards:
            s.param.grad = None
            s.local.grad = None

    def moments(self) -> dict[str, Tensor]:
        """Optimizer state: "name.exp_avg" and "name.exp_avg_sq" laid out as the parameter, and "name.step".

        Missing state (no step yet) is created as zeros, so that a checkpoint can be loaded into it in place.
        """
        out: dict[str, Tensor] = {}
        for s in self.shards:
            assert self.adam is not None
            state = self.adam.state[s.local]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(s.local)
                state["exp_avg_sq"] = torch.zeros_like(s.local)
            out[f"{s.name}.step"] = state["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{s.name}.{key}"] = shaped_as(s.param, state[key])
        return out


def _sum(shards: Sequence[_Shard], group: dist.ProcessGroup | None) -> None:
    """Add up the gradients of `shards` over `group`."""
    grads = [s.local.grad for s in shards if s.local.grad is not None]
    if not grads or group is None:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat, group=group)
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def shaped_as(param: Tensor, shard: Tensor) -> Tensor:
    """`shard` as a DTensor laid out like `param`, sharing memory; plain where the parameter is plain."""
    if not isinstance(param, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
