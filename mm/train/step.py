"""One training or evaluation step: the handlers of a schedule's actions on this rank.

Parts have autograd graphs of their own. What enters a part is a detached leaf, whose gradient goes back to
where it came from; parallel.schedule.executor.execute says what each kind of action must do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from encoders.contract import join_batches, pack_items
from encoders.module import RowsMismatch
from mm.errors import DataError
from mm.plan.blueprint import SINK
from mm.ranks.batch import RankMicrobatch
from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.flight import Flight, Key, key_of
from parallel.schedule import Action, Kind, SchedulePlan, execute
from parallel.schedule.executor.execute import Observe
from parallel.schedule.executor.halves import Kept, backward_input, backward_weight


@dataclass
class StepResult:
    """This rank's share of a step.

    loss: sum of its supervised tokens' losses divided by the step's global count; one replica counts, so that
    summing over ranks gives the loss. seconds: host time by (kind, module).
    """

    loss: float = 0.0
    seconds: dict[tuple[Kind, str], float] = field(default_factory=dict)


OnTokens = Callable[[RankMicrobatch, Tensor], None]


def run_step(
    job: Job,
    prepared: Prepared,
    *,
    train: bool,
    on_tokens: OnTokens | None = None,
    observe: Observe | None = None,
) -> StepResult:
    """Run every micro-batch of a prepared step; gradients are left in the modules' parameters.

    on_tokens: called with each micro-batch and its token losses [T] (evaluation), where they are computed.
    observe: called after every action with its Record, for drawings and measurements. Does not update.
    """
    schedule = job.blueprint.schedule(prepared.plan.active, train=train)
    actions = schedule.actions(job.rank.rank)
    run = _Run(job, prepared, schedule, on_tokens)
    for both in job.boundaries.values():
        for boundary in both:
            boundary.stats.reset()
    with torch.set_grad_enabled(train):
        seconds = execute(actions, run.handlers, observe=observe)
    run.flight.finish()
    return StepResult(float(run.loss), seconds)


class _Run:
    """Tensors in flight between the actions of one step."""

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        schedule: SchedulePlan,
        on_tokens: OnTokens | None,
    ) -> None:
        self.job, self.micro, self.supervised = job, prepared.micro, prepared.plan.supervised
        self.active = prepared.plan.active
        self.on_tokens = on_tokens
        self.device = job.rank.device
        self.flight = flight = Flight(job, prepared, schedule)
        self.outputs = flight.outputs
        self.joint: dict[Key, Tensor] = {}  # outputs of several micro-batches at once, by the first
        # From BACKWARD_INPUT to BACKWARD_WEIGHT: what weights' gradients are made of, or the gradient of the
        # output where BACKWARD_WEIGHT goes through the graph again. It does so in a stage's last, since FSDP
        # reduces in a backward of the whole, and where layers are recomputed.
        self.kept: dict[Key, list[Kept]] = {}
        self.gradients: dict[Key, Tensor] = {}
        self.last = {key_of(a) for a in schedule.actions(job.rank.rank) if a.last}
        self.recomputes = bool(job.blueprint.cfg.train.recompute or job.blueprint.cfg.train.offload)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.handlers = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
            Kind.BOUNDARY_FORWARD: flight.boundary_forward,
            Kind.BOUNDARY_BACKWARD: flight.boundary_backward,
            Kind.SEND_FORWARD: flight.send_forward,
            Kind.RECV_FORWARD: flight.recv_forward,
            Kind.SEND_BACKWARD: flight.send_backward,
            Kind.RECV_BACKWARD: flight.recv_backward,
            Kind.GATHER: self.gather,
            Kind.FREE: self.free,
            Kind.GRAD_SYNC: self.grad_sync,
        }

    # forward

    def forward(self, action: Action) -> float:
        key = key_of(action)
        self.flight.let_go(action)
        hidden = self.flight.hidden(key)
        if action.module == SINK:
            return self._forward_sink(key, hidden)
        ready = time.perf_counter()
        self._forward_source(action, hidden)
        return ready

    def _forward_source(self, action: Action, hidden: Tensor | None) -> None:
        module, keys = action.module, self._covered(action)
        mine = [self.micro[i] for _, _, i in keys]
        part = self._part(keys[0])
        try:
            if hidden is not None:
                out = part(mine[0].items[module], hidden)
            elif len(mine) > 1:
                out = part(join_batches([mb.items[module] for mb in mine]))
            else:
                out = part(mine[0].items[module])
        except RowsMismatch as error:
            names = [name for mb in mine for name in mb.names[module]]
            raise DataError(f"module {module}, sample {names[error.item]}: {error.why}") from error
        values = out if isinstance(out, Tensor) else out.values
        if len(keys) == 1:
            self.outputs[keys[0]] = values
            return
        if self.flight.learns(keys[0]):
            self.joint[keys[0]] = values
        edge = next(e for e in self.job.blueprint.edges if e.source == module)
        rows = [mb.edges[edge].forward.rows_in for mb in mine]
        self.outputs |= dict(zip(keys, values.detach().split(rows), strict=True))

    def _covered(self, action: Action) -> list[Key]:
        """What a source's action computes: the micro-batches that it spans and that have items."""
        module, stage, first = action.module, action.stage, action.microbatch
        span = range(first, first + action.span)
        return [(module, stage, i) for i in span if action.span == 1 or module in self.active[i]]

    def _forward_sink(self, key: Key, hidden: Tensor | None) -> float:
        i = key[2]
        mb = self.micro[i]
        assert mb.llm is not None
        rows = self.flight.rows(key)
        ready = time.perf_counter()
        out = self._part(key)(mb.llm, rows) if hidden is None else self._part(key)(mb.llm, rows, hidden)
        if key != self.flight.last_stage(SINK, i):
            self.outputs[key] = out
            return ready
        if self.on_tokens is not None:
            self.on_tokens(mb, out)
        loss = out.sum() / self.supervised
        if self.flight.learns(key):
            self.outputs[key] = loss
        if self.job.counts_loss:
            self.loss += loss.detach()
        return ready

    # backward

    def backward(self, action: Action) -> float:
        keys = self._covered(action)
        self._synchronise(keys[0], action.last)
        self.flight.let_go(action)
        outputs = [self.outputs.pop(key) for key in keys]
        grads = [self.flight.output_gradient(key) for key in keys]
        output, grad = outputs[0], grads[0]
        if len(keys) > 1:
            output, grad = self.joint.pop(keys[0]), torch.cat([g for g in grads if g is not None])
        ready = time.perf_counter()
        if output.requires_grad:  # not where the first layers are frozen
            output.backward(grad)
        return ready

    def backward_input(self, action: Action) -> float:
        key = key_of(action)
        self._synchronise(key, False)
        self.flight.let_go(action)
        output, grad = self.outputs[key], self.flight.output_gradient(key)
        ready = time.perf_counter()
        wanted = [t for t in self.flight.leaves(key) if t.requires_grad]
        follows = key[0] not in self.job.blueprint.frozen  # the weights' turn comes
        again = follows and (not wanted or key in self.last or self.recomputes)
        self._fsdp(key).set_reshard_after_backward(not again)
        if not follows:
            del self.outputs[key]
            if wanted:
                output.backward(grad, inputs=wanted)
            return ready
        if not output.requires_grad:
            return ready
        if not again:
            del self.outputs[key]
            self.kept[key] = backward_input(output, grad, wanted)
            return ready
        if wanted:
            output.backward(grad, inputs=wanted, retain_graph=True)
        if grad is not None:
            self.gradients[key] = grad
        return ready

    def backward_weight(self, action: Action) -> None:
        key = key_of(action)
        self.flight.let_go(action)
        if key in self.kept:
            backward_weight(self.kept.pop(key))
            return
        self._synchronise(key, action.last)
        part, output = self._part(key), self.outputs.pop(key)
        self._fsdp(key).set_reshard_after_backward(action.last)
        self._unshard(key)  # the graph's leaves are the gathered weights
        weights = [p for p in part.parameters() if p.requires_grad]
        if weights and output.requires_grad:
            output.backward(self.gradients.pop(key, None), inputs=weights)

    def _synchronise(self, key: Key, last: bool) -> None:
        """Have FSDP reduce gradients in the stage's last backward of the step, add them up before."""
        part, each = self._fsdp(key), self.job.blueprint.params(key[0]) == "each"
        part.set_requires_gradient_sync(last and each)
        part.set_is_last_backward(last and each)

    # parameters of parts that are gathered once a step

    def gather(self, action: Action) -> None:
        key = key_of(action)
        self._fsdp(key).set_reshard_after_backward(False)
        self._unshard(key)

    def _unshard(self, key: Key) -> None:
        for module in self._part(key).modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def free(self, action: Action) -> None:
        for module in self._part(key_of(action)).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def grad_sync(self, action: Action) -> None:
        """Have FSDP reduce what all backwards of the step have added up: it does so in a backward, here one
        without items."""
        key = key_of(action)
        part, use = self._fsdp(key), self.job.blueprint.inputs.encoders[action.module]
        part.set_requires_gradient_sync(True)
        part.set_is_last_backward(True)
        kw: dict[str, Any] = {"device": self.device, "dtype": self.job.blueprint.dtype}
        self._part(key)(pack_items(use.cls, use.cfg, [], [], **kw)).values.sum().backward()

    def _fsdp(self, key: Key) -> FSDPModule:
        part = self._part(key)
        assert isinstance(part, FSDPModule)
        return part

    def _part(self, key: Key) -> nn.Module:
        return self.job.parts[key[0]][key[1]]
