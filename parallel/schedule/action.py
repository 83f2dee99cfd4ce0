"""One entry of a schedule."""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple


class Kind(Enum):
    """What an action does; a boundary action is named by its source module.

    Forward and backward compute and may run collectives of their groups; GATHER, FREE, GRAD_SYNC and
    OPTIMIZER act on parameters. Sends, receives and boundary actions only put a transfer under way: who
    consumes it waits for it (see parallel.schedule.executor.execute).
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward_input"  # gradients of a stage's inputs alone: what the stage before waits for
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

    # Members are singletons: identity is the hash. Enum's own hashes the name, in Python, at each lookup.
    __hash__ = object.__hash__


# For code that goes through many actions: a look-up in an Enum class costs several calls of a function.
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
_GRADIENTS = (SEND_BACKWARD, RECV_BACKWARD)
POSTED = SENDS | RECEIVES | BOUNDARY  # what is only put under way

Scope = Literal["module", "edge", "world"]
Direction = Literal["", "forward", "backward"]


class Group(NamedTuple):
    """The name of a process group; SchedulePlan.instances() gives the ranks.

    scope: "module": the ranks along `axis` of `module`'s layout. "edge": all ranks at either end of the edge
        from `module` to the sink's `stage`. "world": all ranks of the job. Because the scope is a field of
        its own, a module may have any name.
    direction: of the axis "pp" and of edges, which have a group for each direction.
    """

    scope: Scope
    module: str = ""
    axis: str = ""
    direction: Direction = ""
    stage: int = 0

    def __str__(self) -> str:
        head = self.scope if self.scope != "module" else ""
        stage = str(self.stage) if self.stage else ""
        return ".".join(part for part in (head, self.module, stage, self.axis, self.direction) if part)


WORLD = Group("world")

# (kind, module, micro-batch, stage), which is action[:4]: what identifies an action within its list. A plain
# tuple, because a large plan makes half a million of them.
ActionKey = tuple[Kind, str, int, int]


class Action(NamedTuple):
    """Do `kind` for `module` (for a boundary: its source module) on micro-batch `microbatch`.

    stage: global index of the module's virtual stage; stage s lives on pipeline rank s % pp. Of a boundary:
        the sink's stage that the rows enter.
    last: the stage's last backward of the step, after which its gradients are reduced over dp.
    peer: sends and receives: the stage at the other end, on the rank that differs along pp alone.
    span: the action covers micro-batches [microbatch, microbatch + span), for encoders that take several
        micro-batches of the language model at once.
    groups: the process groups that it uses, in order, the rank's own of each name. SchedulePlan.members()
        gives the ranks.
    """

    kind: Kind
    module: str
    microbatch: int
    stage: int = 0
    last: bool = False
    peer: int | None = None
    span: int = 1
    groups: tuple[Group, ...] = ()

    @property
    def microbatches(self) -> range:
        """Those that it covers."""
        return range(self.microbatch, self.microbatch + self.span)

    @property
    def tag(self) -> int:
        """A message tag for sends and receives: equal at both ends, distinct within a step and group."""
        assert self.peer is not None, self
        return 2 * (self.microbatch * 4096 + max(self.stage, self.peer)) + (self.kind in _GRADIENTS)

    def __str__(self) -> str:
        where = f"{self.module}.{self.stage}" if self.stage or self.peer is not None else self.module
        many = f"-{self.microbatch + self.span - 1}" if self.span > 1 else ""
        return f"{self.kind.value}({where}, {self.microbatch}{many}{', last' if self.last else ''})"
