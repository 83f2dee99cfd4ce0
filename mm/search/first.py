"""Best first: the leaves of a tree that cost least, found without looking at most of it. Pure.

Each branch has a bound, never above the cost of a leaf below it. Branches are opened in the order of their
bounds, so a leaf whose cost is not above any bound that is left is the best of those not yet taken. That is
the proof: what is left over cannot cost less. (A*, Hart, Nilsson and Raphael 1968, with costs at the leaves.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Branch(Hashable, Protocol):
    """bound: least cost below; math.inf where nothing below it is possible. leaf: it is a candidate itself.
    key: an order of the tree's branches and leaves, which breaks ties. size: leaves below, itself included.
    """

    @property
    def bound(self) -> float: ...
    @property
    def leaf(self) -> bool: ...
    @property
    def key(self) -> tuple[object, ...]: ...
    @property
    def size(self) -> int: ...


B = TypeVar("B", bound=Branch)


@dataclass(frozen=True)
class Found(Generic[B]):
    """best: (cost, leaf) of the cheapest, in order. costed: leaves whose cost was asked for. left: branches
    that were never opened, and leaves never asked for. least: the least bound of those, math.inf where there
    are none. proved: whether none of those left can be among the best.
    """

    best: tuple[tuple[float, B], ...]
    costed: tuple[tuple[float, B], ...]
    left: tuple[B, ...]
    least: float
    proved: bool


@dataclass
class Search(Generic[B]):
    """A search of one tree, whose opened branches and asked costs are remembered for the next question.

    expand: the branches or leaves of a branch. cost: of a leaf; math.inf where it is not possible.
    """

    expand: Callable[[B], Iterable[B]]
    cost: Callable[[B], float]
    opened: dict[B, tuple[B, ...]] = field(default_factory=dict)
    costs: dict[B, float] = field(default_factory=dict)

    def best(
        self,
        roots: Iterable[B],
        k: int,
        *,
        keep: Callable[[B], bool] = lambda branch: True,
        stop: Callable[[], bool] = lambda: False,
        enough: Callable[[float], bool] = lambda least: False,
    ) -> Found[B]:
        """The k leaves of least cost, those of equal cost in the order of their keys.

        keep: whether a branch may hold a leaf that is asked for, or a costed leaf is one. stop: asked before
        a branch is opened or a cost asked for, whether to end with what is found, without its proof.
        enough: as stop, told the least bound of what is left.
        O(n log n) in the branches whose bound is at most the cost of the last of the best.
        """
        roots = list(roots)
        queue = [_entry(b) for b in roots if b.bound < math.inf and keep(b)]
        heapq.heapify(queue)
        best: list[tuple[float, B]] = []
        costed: list[tuple[float, B]] = []
        while queue and len(best) < k:
            value, done, _, branch = queue[0]
            new = not done and branch not in self.costs and branch not in self.opened
            if new and (stop() or enough(value)):
                return _found(self.best_known(k, keep), costed, queue, proved=False)
            heapq.heappop(queue)
            if done:
                best.append((value, branch))
            elif branch.leaf:
                cost = self.cost_once(branch)
                costed.append((cost, branch))
                if cost < math.inf and keep(branch):
                    heapq.heappush(queue, (cost, 1, branch.key, branch))
            else:
                for below in self.expand_once(branch):
                    if below.bound < math.inf and keep(below):
                        heapq.heappush(queue, _entry(below))
        return _found(best, costed, queue, proved=True)

    def best_known(self, k: int, keep: Callable[[B], bool]) -> list[tuple[float, B]]:
        """The best of the leaves whose costs are known."""
        found = [(cost, leaf) for leaf, cost in self.costs.items() if cost < math.inf and keep(leaf)]
        return heapq.nsmallest(k, found, key=lambda entry: (entry[0], entry[1].key))

    def least(self, roots: Iterable[B], keep: Callable[[B], bool]) -> float:
        """The least bound of what is left: branches that were not opened, and leaves without a known cost."""
        left = [b for b in roots if b.bound < math.inf and keep(b)]
        found = math.inf
        while left:
            branch = left.pop()
            if branch in self.opened:
                left += [b for b in self.opened[branch] if b.bound < math.inf and keep(b)]
            elif branch not in self.costs:
                found = min(found, branch.bound)
        return found

    def cost_once(self, leaf: B) -> float:
        """The cost of a leaf, remembered."""
        if leaf not in self.costs:
            self.costs[leaf] = self.cost(leaf)
        return self.costs[leaf]

    def expand_once(self, branch: B) -> tuple[B, ...]:
        """The branches of a branch, remembered."""
        if branch not in self.opened:
            self.opened[branch] = tuple(self.expand(branch))
        return self.opened[branch]


Entry = tuple[float, int, tuple[object, ...], B]  # (bound or cost, whether it is a cost, key, branch)


def _entry(branch: B) -> Entry[B]:
    # Among equals bounds come before costs: what may cost as little is asked before one is taken.
    return branch.bound, 0, branch.key, branch


def _found(
    best: list[tuple[float, B]], costed: list[tuple[float, B]], queue: list[Entry[B]], *, proved: bool
) -> Found[B]:
    left = tuple(entry[3] for entry in queue if not entry[1])
    least = min((branch.bound for branch in left), default=math.inf)
    return Found(tuple(best), tuple(costed), left, least, proved)
