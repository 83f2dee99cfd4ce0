"""The optimizer of a sharded module: sums of gradients, their global norm, and updates by a rule (rules.py).

It works on plain local tensors. DTensors appear only at the edges (checkpoints, global shapes).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.sequence.host import to_device
from parallel.sharding.average import Average
from parallel.sharding.muon import MuonRule, is_matrix
from parallel.sharding.param import ParamSpec, declared, local
from parallel.sharding.rules import AdamW, Muon, Rule, Shard, adam_rule
from parallel.sharding.shard import data_view, sharded_dims
from parallel.topology.mesh import ModuleMesh

AVERAGE = "average"  # the rule that keeps an average of the weights
RULES = ("adam", "muon", AVERAGE)  # names of rules, which begin the names of their state


@dataclass(frozen=True)
class _Shard(Shard):
    """One parameter as the optimizer sees it.

    weight: 1 / number of ranks that hold the same elements, its weight in the gradient norm.
    partial: whether its gradient is summed over tp.
    shared: whether its gradient is summed over the first and the last pipeline rank.
    scalar: whether its gradient is summed over the data ranks, which FSDP does for all others.
    """

    weight: float
    partial: bool
    shared: bool
    scalar: bool


class Gradients(NamedTuple):
    """Of the parameters that have a gradient, by name. squares: this rank's parts of their squared norms,
    float64 [n]. largest: absolute elements of this rank's shards, 0 where a shard is empty."""

    names: list[str]
    squares: Tensor
    largest: Tensor


class ShardedOptimizer:
    """Updates one module's parameters on this rank; its state is sharded exactly as the parameters are.

    parts: the module's pipeline stages on this rank, whose parameters have the names of the whole module.
    hyper: of AdamW, or of Muon for matrices.
    rate: by parameter's name, a factor on the learning rate.
    average: decay of an exponential average of the weights; None keeps none.
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
        hyper: AdamW | Muon,
        *,
        shared: Collection[str] = (),
        rate: Callable[[str], float] = lambda _: 1.0,
        average: float | None = None,
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
                spec=spec,
                rate=rate(name),
                weight=1.0 / copies,
                partial=spec.partial and replicas > 1,
                shared=twice,
                scalar=scalar,
            )
            self.shards.append(shard)
        assert mesh.ends is not None or not any(s.shared for s in self.shards), "the mesh must tie its ends"
        weights = np.asarray([s.weight for s in self.shards], dtype=np.float64)
        self._weights = to_device(weights, self.device).unbind()
        self.rules = make_rules(self.shards, mesh, hyper)
        if average is not None and self.shards:
            self.rules[AVERAGE] = Average(self.shards, average)  # the last, so after all updates

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
        learnt = self._learnt()
        return self._squares(learnt).sum()

    @torch.no_grad()
    def gradients(self) -> Gradients:
        """norm_squared() by parameter, and this rank's largest element of each gradient."""
        learnt = self._learnt()
        largest = torch.zeros(len(learnt), dtype=torch.float64, device=self.device)
        filled = [k for k, (_, g, _) in enumerate(learnt) if g.numel()]  # shards may be empty
        if filled:
            found = torch.stack(torch._foreach_norm([learnt[k][1] for k in filled], torch.inf))
            at = to_device(np.asarray(filled, dtype=np.int64), self.device)
            largest.index_copy_(0, at, found.to(torch.float64))
        return Gradients([name for name, _, _ in learnt], self._squares(learnt), largest)

    def _learnt(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, gradient, weight in the norm) of the parameters that have a gradient."""
        pairs = zip(self.shards, self._weights, strict=True)
        return [(s.name, s.local.grad, weight) for s, weight in pairs if s.local.grad is not None]

    def _squares(self, learnt: Sequence[tuple[str, Tensor, Tensor]]) -> Tensor:
        if not learnt:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        norms = torch.stack(torch._foreach_norm([g for _, g, _ in learnt])).to(torch.float64)
        return norms.square() * torch.stack([weight for *_, weight in learnt])

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply every gradient by `factor`, for clipping."""
        grads = [s.local.grad for s in self.shards if s.local.grad is not None]
        if grads and factor != 1.0:
            torch._foreach_mul_(grads, factor)

    def step(self, lr: float) -> None:
        """Update the parameters with learning rate `lr` and drop the gradients."""
        for rule in self.rules.values():
            rule.step(lr)
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        for s in self.shards:
            s.param.grad = None
            s.local.grad = None

    def swap_average(self) -> None:
        """Exchange the weights and their average, where one is kept; a second call undoes it."""
        average = self.rules.get(AVERAGE)
        if isinstance(average, Average):
            average.swap()

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by "RULE.NAME.KEY": "adam.NAME.exp_avg", sharded as the parameter.

        State that does not exist before the first step is created as zeros, so a checkpoint can be loaded in
        place.
        """
        params = {s.name: s.param for s in self.shards}
        return {
            f"{rule}.{name}.{key}": shaped_as(params[name], value) if key != "step" else value
            for rule, updates in self.rules.items()
            for name, kept in updates.state().items()
            for key, value in kept.items()
        }


def average_name(parameter: str) -> str:
    """The name of a parameter's average in ShardedOptimizer.state()."""
    return f"{AVERAGE}.{parameter}.value"


def make_rules(shards: Sequence[Shard], mesh: ModuleMesh, hyper: AdamW | Muon) -> dict[str, Rule]:
    """The rules that update these parameters, by name; none for no parameters."""
    rules: dict[str, Rule] = {}
    if isinstance(hyper, Muon):
        matrices = [s for s in shards if is_matrix(s.spec, s.param.ndim)]
        if matrices:
            rules["muon"] = MuonRule(matrices, mesh, hyper)
        shards, hyper = [s for s in shards if not is_matrix(s.spec, s.param.ndim)], hyper.rest
    if shards:
        rules["adam"] = adam_rule(shards, hyper)
    return rules


def state_bytes(hyper: AdamW | Muon, spec: ParamSpec, ndim: int, stored: int) -> int:
    """Bytes of state for an element of a parameter whose elements take `stored`."""
    if isinstance(hyper, Muon):
        if is_matrix(spec, ndim):
            return stored
        hyper = hyper.rest
    return 2 * (stored if hyper.moments is None else hyper.moments.itemsize)


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
