"""One entry of a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an action does; a boundary action is named by its source module."""

    FORWARD = "forward"
    BACKWARD = "backward"
    BOUNDARY_FORWARD = "boundary_forward"
    BOUNDARY_BACKWARD = "boundary_backward"


@dataclass(frozen=True)
class Action:
    """Do `kind` for `module` (for a boundary: its source module) on micro-batch `microbatch`.

    last: the module's last backward of the step, after which its gradients are reduced over dp.
    """

    kind: Kind
    module: str
    microbatch: int
    last: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value}({self.module}, {self.microbatch}{', last' if self.last else ''})"
