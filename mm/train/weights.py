"""The weights of the stages on this rank, as FSDP2 holds them: gathered, freed, their gradients reduced."""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule

from encoders.contract import pack_items
from mm.train.flight import Flight, Key, key_of
from parallel.schedule import Action


class Weights:
    """Handlers of GATHER, FREE and GRAD_SYNC, and what FSDP must know before a backward."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight

    def gather(self, action: Action) -> None:
        """Make a stage's weights whole on every rank of its dp axis, until they are freed."""
        self.keep(key_of(action), True)
        self.unshard(key_of(action))

    def free(self, action: Action) -> None:
        """Give the memory of whole weights back."""
        for module in self._fsdp_modules(key_of(action)):
            module.reshard()

    def grad_sync(self, action: Action) -> None:
        """Reduce the gradients that all backwards of the step have added up.

        FSDP reduces only in a backward. This one runs the stage on no items.
        """
        key, blueprint = key_of(action), self.flight.job.blueprint
        use = blueprint.inputs.encoders[action.module]
        self._reduce_in_next_backward(key, True)
        nothing = pack_items(
            use.cls, use.cfg, [], [], device=self.flight.job.rank.device, dtype=blueprint.dtype
        )
        self.flight.part(key)(nothing).values.sum().backward()

    def before_backward(self, key: Key, last: bool) -> None:
        """Have FSDP reduce gradients in the stage's last backward of the step, and add them up before it.

        Modules whose weights are gathered once a step reduce in grad_sync().
        """
        each = self.flight.job.blueprint.params(key.module) == "each"
        self._reduce_in_next_backward(key, last and each)

    def keep(self, key: Key, kept: bool) -> None:
        """Whether the stage's whole weights stay after its next backward."""
        self._fsdp(key).set_reshard_after_backward(not kept)

    def unshard(self, key: Key) -> None:
        """Make the stage's weights whole now."""
        for module in self._fsdp_modules(key):
            module.unshard()

    def _reduce_in_next_backward(self, key: Key, reduce: bool) -> None:
        part = self._fsdp(key)
        part.set_requires_gradient_sync(reduce)
        part.set_is_last_backward(reduce)

    def _fsdp_modules(self, key: Key) -> list[FSDPModule]:
        """The stage and the layers of it that FSDP gathers on their own."""
        return [m for m in self.flight.part(key).modules() if isinstance(m, FSDPModule)]

    def _fsdp(self, key: Key) -> FSDPModule:
        part = self.flight.part(key)
        assert isinstance(part, FSDPModule)
        return part
