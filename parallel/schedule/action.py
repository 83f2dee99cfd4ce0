"""One entry of a schedule."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from parallel.topology.groups import Group


class Kind(Enum):
    """What an action does. parallel.schedule.executor.execute describes each kind for its handler.

    Forwards and backwards compute, and may run collectives of their groups. GATHER, FREE, GRAD_SYNC and
    OPTIMIZER act on parameters. Gathers, sums of gradients, sends, receives and boundary actions only start a
    transfer: the action that uses its result waits for it. A boundary action carries the name of its source
    module.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"  # gradients of a stage's inputs, which the stage before waits for
    BACKWARD_WEIGHT = "backward_weight"  # gradients of its weights, later
    BOUNDARY_FORWARD = "boundary_forward"
    BOUNDARY_BACKWARD = "boundary_backward"
    SEND_FORWARD = "send_forward"  # activations to the next stage
    RECV_FORWARD = "recv_forward"
    SEND_BACKWARD = "send_backward"  # gradients to the stage before
    RECV_BACKWARD = "recv_backward"
    GATHER = "gather"  # a stage's parameters, whole on every rank of its dp axis, until FREE
    FREE = "free"
    GRAD_SYNC = "grad_sync"  # a stage's gradients, summed over dp
    OPTIMIZER = "optimizer"

    # Members are singletons, so identity can be the hash. Enum's own hash runs Python code at each look-up.
    __hash__ = object.__hash__


# For loops over many actions: looking a member up in its Enum class costs several function calls.
FORWARD = Kind.FORWARD
BACKWARD = Kind.BACKWARD
BACKWARD_INPUT = Kind.BACKWARD_INPUT
BACKWARD_WEIGHT = Kind.BACKWARD_WEIGHT
BOUNDARY_FORWARD = Kind.BOUNDARY_FORWARD
BOUNDARY_BACKWARD = Kind.BOUNDARY_BACKWARD
SEND_FORWARD = Kind.SEND_FORWARD
RECV_FORWARD = Kind.RECV_FORWARD
SEND_BACKWARD = Kind.SEND_BACKWARD
RECV_BACKWARD = Kind.RECV_BACKWARD

COMPUTE = frozenset({FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT})
SENDS = frozenset({SEND_FORWARD, SEND_BACKWARD})
RECEIVES = frozenset({RECV_FORWARD, RECV_BACKWARD})
BOUNDARY = frozenset({BOUNDARY_FORWARD, BOUNDARY_BACKWARD})
OVER_DATA = frozenset({Kind.GATHER, Kind.GRAD_SYNC})  # of a stage's parameters, over all its data ranks
_GRADIENTS = (SEND_BACKWARD, RECV_BACKWARD)
POSTED = SENDS | RECEIVES | BOUNDARY | OVER_DATA  # actions that only start a transfer

# (kind, module, micro-batch, stage), which is action[:4]: what identifies an action within its list. A plain
# tuple, because a large plan makes half a million of them.
ActionKey = tuple[Kind, str, int, int]


class Action(NamedTuple):
    """Do `kind` for `module` on micro-batch `microbatch`.

    module: for a boundary its source module.
    stage: global index of the module's virtual stage; stage s is on pipeline rank s % pp. For a boundary the
        sink's stage that the rows enter.
    last: whether this is the stage's last backward of the step. Its gradients are reduced over dp after it.
    peer: for sends and receives the stage at the other end. It is on the rank that differs along pp alone.
    span: the action covers micro-batches [microbatch, microbatch + span). Encoders may take several
        micro-batches of the language model at once.
    groups: names of the process groups that it uses, in order. SchedulePlan.members() gives their ranks.
    paired: of a FORWARD, that it runs together with the BACKWARD after it in the list, which is of the same
        module and another micro-batch. Both begin when the inputs of both are there. They take turns: one
        computes while an expert exchange of the other is under way.
    """

    kind: Kind
    module: str
    microbatch: int
    stage: int = 0
    last: bool = False
    peer: int | None = None
    span: int = 1
    groups: tuple[Group, ...] = ()
    paired: bool = False

    @property
    def microbatches(self) -> range:
        """The micro-batches that it covers."""
        return range(self.microbatch, self.microbatch + self.span)

    @property
    def tag(self) -> int:
        """The message tag of a send or receive: equal at both ends, distinct within a step and group."""
        assert self.peer is not None, self
        return 2 * (self.microbatch * 4096 + max(self.stage, self.peer)) + (self.kind in _GRADIENTS)

    def __str__(self) -> str:
        where = f"{self.module}.{self.stage}" if self.stage or self.peer is not None else self.module
        many = f"-{self.microbatch + self.span - 1}" if self.span > 1 else ""
        marks = f"{', last' if self.last else ''}{', paired' if self.paired else ''}"
        return f"{self.kind.value}({where}, {self.microbatch}{many}{marks})"
