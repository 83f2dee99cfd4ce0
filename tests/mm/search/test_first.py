"""Best first finds what asking for every cost finds, and says truly what it did not ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.search.first import Search
from mm.search.plan import near_enough


@dataclass(frozen=True)
class Tree:
    """A random tree: its leaves have costs, its branches bounds at most those of all below."""

    name: tuple[int, ...]
    bound: float
    below: tuple[Tree, ...] = field(default=(), hash=False, compare=False)
    cost: float = math.inf

    @property
    def leaf(self) -> bool:
        return not self.below

    @property
    def key(self) -> tuple[object, ...]:
        return self.name

    @property
    def size(self) -> int:
        return 1 if self.leaf else sum(b.size for b in self.below)

    def leaves(self) -> list[Tree]:
        return [self] if self.leaf else [leaf for b in self.below for leaf in b.leaves()]


COSTS = st.one_of(st.integers(0, 6).map(float), st.just(math.inf))  # few values: ties


@st.composite
def trees(draw: st.DrawFn, name: tuple[int, ...] = (0,), depth: int = 3) -> Tree:
    n = draw(st.integers(0, 3)) if depth else 0
    loose = draw(st.integers(0, 2))
    if not n:
        cost = draw(COSTS)
        return Tree(name, min(cost, 9.0) - loose if draw(st.booleans()) else cost, (), cost)
    below = tuple(draw(trees((*name, i), depth - 1)) for i in range(n))
    return Tree(name, min(b.bound for b in below) - loose, below)


def brute(tree: Tree, k: int) -> list[tuple[float, tuple[object, ...]]]:
    return sorted((leaf.cost, leaf.key) for leaf in tree.leaves() if leaf.cost < math.inf)[:k]


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(1, 5))
def test_the_best_are_those_of_asking_for_all(tree: Tree, k: int) -> None:
    found = Search[Tree](lambda b: b.below, lambda b: b.cost).best([tree], k)
    assert [(cost, leaf.key) for cost, leaf in found.best] == brute(tree, k)
    assert found.proved
    if len(found.best) == k:
        assert found.least >= found.best[-1][0]


@settings(max_examples=25, deadline=None)
@given(trees(), st.integers(1, 3), st.integers(0, 4))
def test_every_leaf_is_costed_or_left_or_impossible(tree: Tree, k: int, asked: int) -> None:
    search = Search[Tree](lambda b: b.below, lambda b: b.cost)
    found = search.best([tree], k, stop=lambda: len(search.costs) >= asked)
    seen = {leaf for _, leaf in found.costed} | {x for b in found.left for x in b.leaves()}
    rest = [leaf for leaf in tree.leaves() if leaf not in seen]
    assert all(leaf.cost == math.inf for leaf in rest)
    assert len(found.costed) <= max(asked, len(search.costs))
    left = search.least([tree], lambda b: True)
    assert found.proved or left >= found.least  # what was costed since its bound was met is not left
    assert all(leaf.cost >= left for leaf in rest_of(tree, search))
    if found.proved:  # it may have ended in time
        assert [c for c, _ in found.best] == [c for c, _ in brute(tree, k)]
    elif found.best:  # what is left may be better, but by no more than its bound says
        assert brute(tree, 1)[0][0] >= min(found.least, found.best[0][0])


@settings(max_examples=50, deadline=None)
@given(trees(), st.integers(1, 3), st.sampled_from([0.5, 2.0]))
def test_a_search_ends_where_nothing_left_is_faster_by_a_share(tree: Tree, k: int, share: float) -> None:
    search = Search[Tree](lambda b: b.below, lambda b: b.cost)
    enough = near_enough(search, k, lambda b: True, share)
    found = search.best([tree], k, enough=enough)
    if found.proved:
        assert [cost for cost, _ in found.best] == [cost for cost, _ in brute(tree, k)]
    else:
        assert len(found.best) == k and found.best[-1][0] <= (1 + share) * found.least
        assert all(
            best <= (1 + share) * cost
            for (best, _), (cost, _) in zip(found.best, brute(tree, k), strict=True)
        )
    leaves = (Tree((0, 0), 2.5, (), 3.0), Tree((0, 1), 3.5, (), 4.0))
    few = Search[Tree](lambda b: b.below, lambda b: b.cost)
    root = Tree((0,), 2.5, leaves)
    assert few.best([root], 1, enough=near_enough(few, 1, lambda b: True, share)).left
    whole = few.best([root], 2, enough=near_enough(few, 2, lambda b: True, 0.0))
    assert whole.proved and not whole.left


def test_a_second_question_asks_for_nothing_twice() -> None:
    leaves = tuple(Tree((0, i), float(i), (), float(i)) for i in range(5))
    asked = []

    def cost(leaf: Tree) -> float:
        asked.append(leaf)
        return leaf.cost

    search = Search[Tree](lambda b: b.below, cost)
    root = Tree((0,), 0.0, leaves)
    search.best([root], 2)
    found = search.best([root], 1, keep=lambda b: not b.leaf or b.name[1] % 2 == 1)
    assert found.best == ((1.0, leaves[1]),)
    assert len(asked) == len(set(asked)) <= 3


def rest_of(tree: Tree, search: Search[Tree]) -> list[Tree]:
    """The leaves that may be and have no known cost."""
    if tree.bound == math.inf or tree in search.costs:
        return []
    if tree not in search.opened:
        return tree.leaves()
    return [leaf for b in tree.below for leaf in rest_of(b, search)]
