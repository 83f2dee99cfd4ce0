"""The weights of the stages on this rank: when they are whole, and when their gradients are summed."""

from __future__ import annotations

from mm.ranks.job import Job
from mm.train.flight import Flight, Key, key_of
from parallel.schedule import Action, Kind
from parallel.sharding import whole


class Weights:
    """Handlers of GATHER, FREE and GRAD_SYNC, and what FSDP must know before a backward."""

    def __init__(self, flight: Flight) -> None:
        self.flight, self.uses = flight, flight.job.blueprint.uses
        actions = flight.schedule.actions(flight.job.rank.rank)
        # Stages whose gradients are summed after their last backward, not in it.
        self._after = {(a.module, a.stage) for a in actions if a.kind is Kind.GRAD_SYNC}

    def gather(self, action: Action) -> None:
        """Make a stage's weights whole on all its data ranks, until they are freed."""
        whole.gather(self.flight.part(key_of(action)))

    def free(self, action: Action) -> None:
        """Give the memory of whole weights back."""
        whole.free(self.flight.part(key_of(action)))

    def grad_sync(self, action: Action) -> None:
        """Sum the gradients that all backwards of the step have added up."""
        whole.sum_now(self.flight.part(key_of(action)), True, final=True)

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

    def _sums(self, action: Action) -> bool:
        """Whether the backward of an action sums gradients over the data ranks."""
        last = action.last and (action.module, action.stage) not in self._after
        return last or self.uses[action.module].sums == "backward"


def gather_held(job: Job) -> None:
    """Make the weights whole that are so between steps; nothing where they are. Every rank calls this."""
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
