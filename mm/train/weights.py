"""The weights of the stages on this rank: when they are whole, and when their gradients are summed.

Gathers and sums are started here. The forward that needs whole weights waits for them; the end of the step
waits for the sums.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mm.ranks.job import Job
from mm.train.flight import Flight, Key, key_of
from parallel.schedule import Action, Kind, ModuleUse
from parallel.schedule.plan import gather_groups, parameter_groups
from parallel.sharding import whole


class Weights:
    """Handlers of GATHER, FREE and GRAD_SYNC, and what FSDP must know before a backward."""

    def __init__(self, flight: Flight) -> None:
        self.flight, self.uses = flight, flight.job.blueprint.uses
        actions = flight.schedule.actions(flight.job.rank.rank)
        # Stages whose gradients are summed after their last backward, not in it.
        self._after = {(a.module, a.stage) for a in actions if a.kind is Kind.GRAD_SYNC}
        learnt = [key_of(a) for a in actions if a.last and not self.uses[a.module].frozen]
        self._parts = {(key.module, key.stage): flight.part(key) for key in learnt}
        self._posted = {
            stage: whole.post_sums(part)
            for stage, part in self._parts.items()
            if whole.on_host(part) and _summed_once(stage[0], self.uses[stage[0]])
        }

    def gather(self, action: Action) -> None:
        """Start to make a stage's weights whole on all its data ranks, until they are freed."""
        whole.gather(self.flight.part(key_of(action)))

    def free(self, action: Action) -> None:
        """Give the memory of whole weights back."""
        whole.free(self.flight.part(key_of(action)))

    def grad_sync(self, action: Action) -> None:
        """Start to sum the gradients that all backwards of the step have added up."""
        posted = self._posted.get((action.module, action.stage))
        if posted is not None:
            posted.most = sys.maxsize  # the gradients are there, whether a sum reads them or not
        whole.sum_now(self.flight.part(key_of(action)), True, final=True)

    def finish(self) -> None:
        """Wait for the sums of the step."""
        for posted in self._posted.values():
            posted.wait()
        for part in self._parts.values():
            whole.finish_sums(part)

    def before_backward(self, action: Action) -> None:
        """Say whether the next backward of a stage sums gradients, and whether it frees whole weights."""
        key = key_of(action)
        self.keep(key, False)
        whole.sum_in_backward(self.flight.part(key), self._sums(action), final=action.last)

    def before_inputs(self, key: Key, keep: bool) -> None:
        """The same for a backward that computes gradients of inputs only. keep: weights are needed again."""
        self.keep(key, keep)
        whole.sum_in_backward(self.flight.part(key), False, final=False)

    def after_weights(self, action: Action) -> None:
        """What FSDP does at the end of a backward, after gradients of weights that came without one."""
        key = key_of(action)
        self.keep(key, True)  # a later micro-batch may have gathered them for its backward
        whole.sum_now(self.flight.part(key), self._sums(action), final=action.last)

    def keep(self, key: Key, kept: bool) -> None:
        """Whether the stage's whole weights stay after its next backward; they do if the policy says so."""
        whole.keep(self.flight.part(key), kept or self.uses[key.module].params != "each")

    def unshard(self, key: Key) -> None:
        """Make the stage's weights whole now."""
        whole.gather(self.flight.part(key))
        whole.wait(self.flight.part(key))

    def _sums(self, action: Action) -> bool:
        """Whether the backward of an action sums gradients over the data ranks."""
        last = action.last and (action.module, action.stage) not in self._after
        return last or self.uses[action.module].sums == "backward"


def _summed_once(module: str, use: ModuleUse) -> bool:
    """Whether FSDP reads no gradient after its sum: it adds none to it, and sums it over no replicas."""
    return use.sums == "step" and gather_groups(module, use) == parameter_groups(module, use)


def gather_held(job: Job) -> None:
    """Start to make the weights whole that are so between steps; nothing where they are. Every rank calls
    this."""
    for module, parts in job.parts.items():
        if job.blueprint.uses[module].params == "replicated":
            for part in parts.values():
                whole.gather(part)


def refresh_held(job: Job) -> None:
    """Gather again the whole weights that an update has made old, so that they travel while data is prepared.

    Every rank calls this.
    """
    for module, parts in job.parts.items():
        use = job.blueprint.uses[module]
        if use.params == "replicated" and not use.frozen:
            for part in parts.values():
                whole.free(part)
    gather_held(job)


@contextmanager
def averaged(job: Job) -> Iterator[None]:
    """Compute with the average of the weights (train.average) in their place. Every rank calls this."""
    _swap_average(job)
    try:
        yield
    finally:
        _swap_average(job)


def _swap_average(job: Job) -> None:
    for module, optimizer in job.optimizers.items():
        for part in job.parts[module].values():
            whole.free(part)  # what is gathered would be the old
        optimizer.swap_average()
    gather_held(job)
