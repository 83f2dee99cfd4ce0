"""The names of a job's process groups. Pure.

A plan names the groups that its actions use; a job makes exactly those. Groups of one lane that have the same
ranks in the same order share a communicator.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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

    @property
    def lane(self) -> str:
        """What the operations of a communicator have in common: all members issue those of one lane in one
        order, so groups of one lane and the same ranks may share a communicator.

        "compute": collectives inside a computation, which goes on when they are done. "parameters": gathers
        of parameters and sums of gradients, which run beside computations. Each direction of a pipeline and
        of an edge is a lane of its own.
        """
        if self.scope == "world":
            return "world"
        if self.axis in ("data", "edp"):
            return "parameters"
        return "compute" if self.scope == "module" and not self.direction else str(self)


WORLD = Group("world")
