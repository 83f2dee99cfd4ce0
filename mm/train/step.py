"""One training or evaluation step: which handler carries out which action of the schedule on this rank.

Stages have autograd graphs of their own. What enters a stage is a detached leaf, whose gradient goes back to
where it came from. parallel.schedule.executor.execute says what each kind of action must do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.config.outline import SINK
from mm.plan.subsets import Subsets
from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.backward import Backward
from mm.train.flight import Flight
from mm.train.forward import Forward, OnTokens
from mm.train.statistics import Watch
from mm.train.trail import Trail
from mm.train.transfer import Transfers
from mm.train.weights import Weights, gather_held
from parallel.comm.turns import Ran
from parallel.schedule import Kind, Record, execute
from parallel.schedule.action import COMPUTE
from parallel.schedule.executor.execute import Half, Handler, Observe
from parallel.sharding.whole import Phases


@dataclass
class StepResult:
    """This rank's share of a step.

    losses: by subset of the step's samples, the sum of its supervised tokens' losses divided by the step's
    global count; one replica counts, so that summing over ranks gives the loss; float64 [subsets] on the
    device, which finish_step() reads. subsets: of the step.
    watch: what the layers gave, where that was asked. trail: where numbers stopped being finite, in training.
    seconds: host time by (kind, module). waited: those of them, by module, until inputs had come.
    """

    losses: Tensor
    subsets: Subsets
    watch: Watch | None = None
    trail: Trail | None = None
    seconds: dict[tuple[Kind, str], float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)


def run_step(
    job: Job,
    prepared: Prepared,
    *,
    train: bool,
    on_tokens: OnTokens | None = None,
    observe: Observe | None = None,
    watch: Watch | None = None,
) -> StepResult:
    """Run every micro-batch of a prepared step; gradients are left in the modules' parameters.

    on_tokens: called with each micro-batch and its token losses [T] (evaluation), where they are computed.
    observe: called after every action with its Record, for drawings and measurements.
    watch: listens to the layers. Does not update.
    """
    schedule = job.blueprint.schedule(prepared.plan.active, train=train)
    flight = Flight(job, prepared, schedule)
    transfers = Transfers(flight)
    trail = Trail(prepared) if train else None
    forward = Forward(flight, transfers, on_tokens, watch, trail)
    weights = Weights(flight)
    for both in job.boundaries.values():
        for boundary in both:
            boundary.stats.reset()
    gather_held(job)
    record, waited = job.rank.record, dict.fromkeys(job.blueprint.modules, 0.0)

    def seen(done: Record) -> None:
        record.end_action()
        waited[done.action.module] += done.ready - done.start if done.action.kind in COMPUTE else 0.0
        if observe is not None:
            observe(done)

    with torch.set_grad_enabled(train), nullcontext() if watch is None else watch.hooked():
        handlers = _handlers(transfers, forward, Backward(flight, transfers, weights, trail), weights)
        try:
            seconds = execute(
                schedule.actions(job.rank.rank),
                handlers,
                observe=seen,
                starting=record.begin,
                together=_Together(job),
            )
        finally:
            job.turns.close()
    transfers.finish()
    weights.finish()
    return StepResult(forward.losses, prepared.plan.subsets, watch, trail, seconds, waited)


class _Together:
    """Runs the two of a pair: computations of the language model, whose stages FSDP has states of."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._phases: Phases | None = None  # looked up once a step, at its first pair

    def __call__(self, first: Half, second: Half) -> tuple[Ran, Ran]:
        if self._phases is None:
            self._phases = Phases(self.job.parts[SINK].values())
        return self.job.turns.run(first, second, self._phases)


def _handlers(
    transfers: Transfers, forward: Forward, backward: Backward, weights: Weights
) -> Mapping[Kind, Handler]:
    return {
        Kind.FORWARD: forward.forward,
        Kind.BACKWARD: backward.backward,
        Kind.BACKWARD_INPUT: backward.backward_input,
        Kind.BACKWARD_WEIGHT: backward.backward_weight,
        Kind.BOUNDARY_FORWARD: transfers.boundary_forward,
        Kind.BOUNDARY_BACKWARD: transfers.boundary_backward,
        Kind.SEND_FORWARD: transfers.send_forward,
        Kind.RECV_FORWARD: transfers.recv_forward,
        Kind.SEND_BACKWARD: transfers.send_backward,
        Kind.RECV_BACKWARD: transfers.recv_backward,
        Kind.GATHER: weights.gather,
        Kind.FREE: weights.free,
        Kind.GRAD_SYNC: weights.grad_sync,
    }
