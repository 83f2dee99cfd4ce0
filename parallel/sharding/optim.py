"""AdamW over the local shards of sharded modules, and the global gradient norm.

The update runs on plain local tensors in one fused call. DTensors appear only at the edges (checkpoints,
global shapes), because dispatching every elementwise update through them costs more than the update itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.sequence.host import to_device
from parallel.sharding.param import declared, local
from parallel.sharding.shard import data_view, sharded_dims
from parallel.topology.mesh import ModuleMesh


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    betas: decay rates of the first and the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, times the learning rate. Vectors and scalars do not decay.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class _Shard:
    """One parameter as the optimizer sees it.

    name: full name in the module.
    param: the module's parameter, a DTensor where it is sharded.
    local: this rank's shard as a plain parameter, sharing memory with `param`.
    weight: 1 / number of ranks that hold the same elements, its weight in the gradient norm.
    partial: whether its gradient is summed over tp.
    shared: whether its gradient is summed over the first and the last pipeline rank.
    scalar: whether its gradient is summed over the data ranks, which FSDP does for all others.
    """

    name: str
    param: nn.Parameter
    local: nn.Parameter
    weight: float
    partial: bool
    shared: bool
    scalar: bool


class ShardedOptimizer:
    """AdamW of one module's parameters on this rank; its state is sharded exactly as the parameters are.

    parts: the module's pipeline stages on this rank, whose parameters have the names of the whole module.
    shared: names of parameters that the first and the last stage both hold, with equal values. Both get the
        sum of their gradients.

    A step calls collect(), norm_squared() (which the caller sums over the job), scale() and step(), in this
    order. A parameter without a gradient keeps its value and state: its module was skipped for the whole
    step.
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
        self.device = next(param.device for part in parts for _, param, _ in declared(part))
        self.shards: list[_Shard] = []
        for name, param, spec in (entry for part in parts for entry in declared(part)):
            if not param.requires_grad:
                continue
            replicas = mesh.axes.tp.size if spec.view == "dense" and not sharded_dims(spec, mesh) else 1
            scalar, twice = not param.ndim, name in shared
            copies = replicas * mesh.replicas(data_view(spec, mesh)) * (2 if twice else 1)
            copies *= mesh.data.size() if scalar else 1
            shard = _Shard(
                name=name,
                param=param,
                local=nn.Parameter(local(param.detach())),
                weight=1.0 / copies,
                partial=spec.partial and replicas > 1,
                shared=twice,
                scalar=scalar,
            )
            self.shards.append(shard)
        assert mesh.ends is not None or not any(s.shared for s in self.shards), "the mesh must tie its ends"
        weights = np.asarray([s.weight for s in self.shards], dtype=np.float64)
        self._weights = to_device(weights, self.device).unbind()
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
        """Move the gradients to the local shards and complete their sums over ranks.

        Gradients of scalars are summed over the data ranks, partial ones over tp, and those of shared
        parameters over both ends of the pipeline: one message for each of these groups.
        """
        for s in self.shards:
            s.local.grad = None if s.param.grad is None else local(s.param.grad)
        for group in self.mesh.data_groups:
            _sum([s for s in self.shards if s.scalar], group)
        # Declarations choose the parameters. Gradients are absent only where the module was skipped, and a
        # module is skipped on all its ranks or on none, so the messages match.
        _sum([s for s in self.shards if s.partial], self.mesh.axes.tp.group)
        _sum([s for s in self.shards if s.shared], self.mesh.ends)

    @torch.no_grad()
    def norm_squared(self) -> Tensor:
        """This rank's part of the squared gradient norm, whose sum over the module's ranks is the whole: a
        float64 scalar on the device, which the caller reads once for all modules.

        Each replica of a parameter contributes an equal part. Not finite where a gradient here is not finite.
        """
        pairs = zip(self.shards, self._weights, strict=True)
        learnt = [(s.local.grad, weight) for s, weight in pairs if s.local.grad is not None]
        if not learnt:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norms = torch.stack(torch._foreach_norm([g for g, _ in learnt])).to(torch.float64)
        weights = torch.stack([w for _, w in learnt])
        return (norms.square() * weights).sum()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every gradient by `factor`, for clipping."""
        grads = [s.local.grad for s in self.shards if s.local.grad is not None]
        if grads and factor != 1.0:
            torch._foreach_mul_(grads, factor)

    def step(self, lr: float) -> None:
        """Update the parameters with learning rate `lr` and drop the gradients."""
        if self.adam is not None:
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        for s in self.shards:
            s.param.grad = None
            s.local.grad = None

    def moments(self) -> dict[str, Tensor]:
        """Optimizer state: "NAME.exp_avg" and "NAME.exp_avg_sq", sharded as the parameter, and "NAME.step".

        State that does not exist before the first step is created as zeros, so a checkpoint can be loaded in
        place.
        """
        out: dict[str, Tensor] = {}
        for s in self.shards:
            assert self.adam is not None
            state = self.adam.state[s.local]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=s.local.device)
                state["exp_avg"] = torch.zeros_like(s.local)
                state["exp_avg_sq"] = torch.zeros_like(s.local)
            out[f"{s.name}.step"] = state["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                out[f"{s.name}.{key}"] = shaped_as(s.param, state[key])
        return out


def _sum(shards: Sequence[_Shard], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of `shards` over `group`, in place and in one message."""
    grads = [s.local.grad for s in shards if s.local.grad is not None]
    if not grads or group is None:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat, group=group)
    for g, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def shaped_as(param: Tensor, shard: Tensor) -> Tensor:
    """`shard` as a DTensor that is sharded like `param` and shares memory; plain where `param` is plain."""
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
