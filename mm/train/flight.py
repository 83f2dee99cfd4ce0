"""What is in flight between the actions of one step on one rank.

There is one InFlight record for each (module, stage, micro-batch). Each of its fields has a lifetime: the
action that fills it and the action that takes it. forward.py, backward.py and transfer.py are those actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from mm.config.outline import SINK
from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from parallel.boundary import Pending
from parallel.schedule import Action, SchedulePlan
from parallel.schedule.executor.halves import Kept

T = TypeVar("T")
Message = Callable[[], Tensor]  # a receive under way; calling it waits and returns what came


class Key(NamedTuple):
    """Names an InFlight record."""

    module: str
    stage: int
    microbatch: int


def key_of(action: Action) -> Key:
    """The record of a computation or a message."""
    return Key(action.module, action.stage, action.microbatch)


class Slot(Generic[T]):
    """Holds one value between two actions: filled once, then taken once, which frees it here."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value: T | None = None

    def fill(self, value: T) -> T:
        """Hold `value`; returns it."""
        assert self._value is None, "filled twice"
        self._value = value
        return value

    def peek(self) -> T | None:
        """The value, which stays; None where the slot is empty."""
        return self._value

    def take(self) -> T:
        """The value, which the slot no longer holds."""
        value = self.take_if_filled()
        assert value is not None, "taken before it was filled"
        return value

    def take_if_filled(self) -> T | None:
        """The value, which the slot no longer holds; None where the slot is empty."""
        value, self._value = self._value, None
        return value


@dataclass
class InFlight:
    """What is alive of one stage in one micro-batch, in execution order: "A -> B" is filled by A, taken by B.

    BACKWARD stands for BACKWARD_INPUT too, where a backward has two halves. Records of stages that live on
    other ranks hold only the transfers that this rank sends there.
    """

    # RECV_FORWARD -> FORWARD. Call it to wait for the states from the stage before.
    hidden_message: Slot[Message] = field(default_factory=Slot)
    # BOUNDARY_FORWARD -> FORWARD of the language model's stage; on ranks that only send -> Transfers.release.
    # By encoder.
    row_transfers: dict[str, Pending] = field(default_factory=dict)
    # FORWARD -> SEND_BACKWARD. A leaf: the states from the stage before. Empty where no backward follows.
    hidden: Slot[Tensor] = field(default_factory=Slot)
    # FORWARD -> BOUNDARY_BACKWARD. Leaves: rows [R, d] or [R, levels, d], by encoder that learns.
    rows: dict[str, Tensor] = field(default_factory=dict)
    # FORWARD -> BACKWARD, or BACKWARD_WEIGHT where that goes through the graph again; where no backward
    # follows -> SEND_FORWARD, or the last BOUNDARY_FORWARD. Attached to its graph.
    output: Slot[Tensor] = field(default_factory=Slot)
    # FORWARD -> BACKWARD of several micro-batches at once, in the record of the first. The `output` of each
    # is then a part of it, without a graph.
    joint_output: Slot[Tensor] = field(default_factory=Slot)
    # RECV_BACKWARD -> BACKWARD. Call it to wait for the gradient of `output`.
    gradient_message: Slot[Message] = field(default_factory=Slot)
    # BOUNDARY_BACKWARD -> BACKWARD of an encoder's last stage; on ranks that only send -> Transfers.release.
    # By stage of the language model.
    gradient_transfers: dict[int, Pending] = field(default_factory=dict)
    # BACKWARD_INPUT -> BACKWARD_WEIGHT. The factors of the weights' gradients.
    products: Slot[list[Kept]] = field(default_factory=Slot)
    # BACKWARD_INPUT -> BACKWARD_WEIGHT. The gradient of `output`, where BACKWARD_WEIGHT goes through the
    # graph again. Empty where `output` is the loss.
    gradient: Slot[Tensor] = field(default_factory=Slot)

    def leaves(self) -> list[Tensor]:
        """What entered the stage and gets a gradient."""
        hidden = self.hidden.peek()
        return [*([] if hidden is None else [hidden]), *self.rows.values()]

    def finish(self) -> None:
        """Wait for the transfers that nothing has waited for. Everything else must have been taken."""
        for pending in (*self.row_transfers.values(), *self.gradient_transfers.values()):
            pending.wait()
        self.row_transfers.clear()
        self.gradient_transfers.clear()
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        left = [n for n, x in held.items() if (x.peek() is not None if isinstance(x, Slot) else x)]
        assert not left, f"never taken: {', '.join(left)}"


@dataclass
class Flight:
    """One step on this rank: its job, data and schedule, and the records of what is in flight."""

    job: Job
    prepared: Prepared
    schedule: SchedulePlan
    _records: dict[Key, InFlight] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: Key) -> InFlight:
        """The record of a stage in a micro-batch; made at the first use."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = InFlight()
        return record

    def finish(self) -> None:
        """Wait for boundary transfers still under way. Every other tensor must have been taken."""
        for record in self._records.values():
            record.finish()

    def part(self, key: Key) -> nn.Module:
        """The module of a stage on this rank."""
        return self.job.parts[key.module][key.stage]

    def last_stage(self, module: str, microbatch: int) -> Key:
        """The last stage of a module in a micro-batch."""
        return Key(module, len(self.job.blueprint.stages[module]) - 1, microbatch)

    def joins(self, action: Action) -> bool:
        """Whether the output of a computation is one tensor of several micro-batches, for the next stage. It
        is then in the record of the first of them, whether that has items or not."""
        return action.span > 1 and action.stage + 1 < len(self.job.blueprint.stages[action.module])

    def is_loss(self, key: Key) -> bool:
        """Whether the output of a stage is the loss."""
        return key == self.last_stage(SINK, key.microbatch)

    def learns(self, key: Key) -> bool:
        """Whether a backward of a stage and micro-batch follows."""
        return self.schedule.learns(key.module, key.microbatch)

    def learns_from(self, action: Action) -> bool:
        """Whether a backward of what a computation or a pipeline message covers follows."""
        return self.learns(self.covered(action)[0])

    def covered(self, action: Action) -> list[Key]:
        """What an action covers: of the micro-batches that it spans those with items of its module."""
        module, stage = action.module, action.stage
        if action.span == 1:
            return [key_of(action)]
        active = self.prepared.plan.active
        return [Key(module, stage, i) for i in action.microbatches if module in active[i]]
