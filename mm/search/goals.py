"""What a search looks for: the best few, the best homogeneous one, the best of each placement, and the best
within less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mm.search.candidate import as_in
from mm.search.space import Space
from mm.search.tree import Node

SHARES = (0.75, 0.5, 0.25)  # of a device's memory, for the frontier of time against memory


@dataclass(frozen=True)
class Goal:
    """k: how many candidates. limit: bytes of the fullest rank. keep: whether a branch may hold one."""

    name: str
    k: int
    limit: float
    keep: Callable[[Node], bool] = lambda node: True


def goals(space: Space, top: int, memory: float) -> list[Goal]:
    """All of them, the main one first. memory: bytes of a device."""
    found = [Goal("best", top, memory), Goal("homogeneous", 1, memory, homogeneous)]
    placements = {frame.placement for frame in space.frames}
    for name in ("colocated", "disjoint", "mixed"):
        if name in placements and len(placements) > 1:
            found.append(Goal(name, 1, memory, placed(name)))
    return found + [Goal(f"{share:.0%} of the memory", 1, share * memory) for share in SHARES]


def placed(name: str) -> Callable[[Node], bool]:
    """Branches of a placement."""
    return lambda node: node.frame.placement == name


def homogeneous(node: Node) -> bool:
    """Branches below which there may be a candidate that is homogeneous (Candidate.homogeneous)."""
    if node.frame.placement != "colocated":
        return False
    sink = node.sink
    return sink is None or all(as_in(choice, sink) for choice in node.encoders)
