"""What a search looks for: the best few, the best homogeneous one, the best of each placement, and the best
within less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mm.search.candidate import Candidate, as_in
from mm.search.predictor import Judged
from mm.search.space import Space
from mm.search.tree import Node

SHARES = (0.75, 0.5, 0.25)  # of a device's memory, for the frontier of time against memory


@dataclass(frozen=True)
class Goal:
    """k: how many candidates. limit: bytes of the fullest rank. keep: whether a branch may hold one. suits:
    whether a candidate is one, in the searched space or beside it."""

    name: str
    k: int
    limit: float
    keep: Callable[[Node], bool] = lambda node: True
    suits: Callable[[Candidate], bool] = lambda candidate: True

    @property
    def weight(self) -> int:
        """Of the time for finding and polishing: what only the frontier has gets least."""
        return 1 if "memory" in self.name and "75%" not in self.name else 3

    def meets(self, found: Judged) -> bool:
        """Whether a candidate with its prediction is one, and fits."""
        return found.why is None and found.bytes <= self.limit and self.suits(found.candidate)


def goals(space: Space, top: int, memory: float) -> list[Goal]:
    """All of them, the main one first. memory: bytes of a device."""
    found = [Goal("best", top, memory), Goal("homogeneous", 1, memory, homogeneous, alike)]
    placements = {frame.placement for frame in space.frames}
    for name in ("colocated", "disjoint", "mixed"):
        if name in placements and len(placements) > 1:
            found.append(Goal(name, 1, memory, placed(name), stands(name)))
    return found + [Goal(f"{share:.0%} of the memory", 1, share * memory) for share in SHARES]


def placed(name: str) -> Callable[[Node], bool]:
    """Branches of a placement."""
    return lambda node: node.frame.placement == name


def stands(name: str) -> Callable[[Candidate], bool]:
    """Candidates of a placement."""
    return lambda candidate: candidate.placement == name


def alike(candidate: Candidate) -> bool:
    """Candidates that are homogeneous."""
    return candidate.homogeneous


def homogeneous(node: Node) -> bool:
    """Branches below which there may be a candidate that is homogeneous (Candidate.homogeneous)."""
    if node.frame.placement != "colocated":
        return False
    sink = node.sink
    return sink is None or all(as_in(choice, sink) for choice in node.encoders)
