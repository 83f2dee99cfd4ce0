"""The pruned search returns the very same best few as asking for every candidate."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mm.search.first import Search
from mm.search.space import Limits, Space
from mm.search.tree import Node, Tree
from tests.mm.search.toy import Toy, every, priced


@st.composite
def spaces(draw: st.DrawFn, most: int) -> Space:
    def some(*numbers: int) -> tuple[int, ...]:
        return (1, *draw(st.sets(st.sampled_from(numbers), max_size=1)))

    world = draw(st.sampled_from([2, 3, 4]))
    sink = Limits(tp=some(2), pp=some(2), vpp=some(2), ep=some(2), layers=4)
    encoders = {"a": Limits(tp=some(2), pp=some(2), layers=2)}
    if draw(st.booleans()):
        encoders["b"] = Limits(layers=1)
    again: tuple[tuple[str, ...], ...] = ((), ("full",)) if draw(st.booleans()) else ((),)
    space = Space(world, world, sink, encoders, draw(st.sampled_from([2, 4])), again)
    assume(sum(root.size for root in Tree(space, Toy(0, space), math.inf).roots()) <= most)
    return space


def search(tree: Tree, toy: Toy, limit: float) -> Search[Node]:
    def cost(leaf: Node) -> float:
        found = toy.outcome(tree.candidate(leaf))
        return math.inf if found is None or found[1] > limit else found[0]

    return Search(tree.expand, cost)


def check(space: Space, seed: int, limit: float, k: int) -> None:
    toy = Toy(seed, space)
    brute = Tree(space, toy, math.inf)
    costs = priced(brute, toy, limit)
    tree, asked = Tree(space, toy, limit), toy.simulated
    found = search(tree, toy, limit).best(tree.roots(), k)
    expected = sorted((cost, leaf.key) for leaf, cost in costs.items())[:k]
    assert [(cost, leaf.key) for cost, leaf in found.best] == expected
    assert toy.simulated - asked == len(found.costed)
    for leaf, cost in costs.items():  # no bound of a whole candidate, or of what it is in, is above its cost
        assert leaf.bound <= cost


FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=80)


@FEW
@given(spaces(60), st.integers(0, 99), st.sampled_from([math.inf, 4.0, 2.5]), st.integers(1, 4))
def test_the_best_few_are_those_of_asking_for_all(space: Space, seed: int, limit: float, k: int) -> None:
    check(space, seed, limit, k)


@pytest.mark.slow
@MANY
@given(spaces(500), st.integers(0, 9999), st.sampled_from([math.inf, 4.0, 2.5, 1.5]), st.integers(1, 6))
def test_many_best_few_are_those_of_asking_for_all(space: Space, seed: int, limit: float, k: int) -> None:
    check(space, seed, limit, k)


@FEW
@given(spaces(500), st.integers(0, 99))
def test_what_is_counted_is_what_there_is(space: Space, seed: int) -> None:
    """Sizes of branches are their numbers of leaves, possible ones and others."""
    dropped: list[Node] = []
    tree = Tree(space, Toy(seed, space), math.inf, drop=dropped.append)
    leaves = sum(1 for _ in every(tree))
    assert leaves + sum(node.size for node in dropped) == sum(root.size for root in tree.roots())
