"""What is found first: candidates of the space, of which no single change is better, goal by goal."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.predict.step import Prediction
from mm.search.candidate import Candidate, Degrees
from mm.search.finder import Finder, closest
from mm.search.goals import Goal, goals
from mm.search.predictor import Judged
from mm.search.sketch import Sketch, moves, nearest, sketch_of
from mm.search.space import Limits, Space
from mm.search.tree import Node, Tree
from tests.mm.search.toy import Toy, every

FEW = settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
LIMITS = st.sampled_from([math.inf, 4.0, 2.5])
MANY = settings(FEW, max_examples=30)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    def some(*numbers: int) -> tuple[int, ...]:
        return (1, *draw(st.sets(st.sampled_from(numbers), max_size=1)))

    sink = Limits(tp=some(2), pp=some(2, 3), vpp=some(2), ep=some(2), layers=6)
    encoders = {"a": Limits(tp=some(2), layers=1)}
    return Space(draw(st.sampled_from([3, 4])), 4, sink, encoders, 4, ((), ("full",)))


def finder(tree: Tree, toy: Toy, limit: float) -> Finder:
    def judge(leaf: Node) -> Judged:
        return judged(toy, tree.candidate(leaf), limit)

    return Finder(tree, list(tree.roots()), judge)


def judged(toy: Toy, candidate: Candidate, limit: float) -> Judged:
    found = toy.outcome(candidate)
    if found is None:
        return Judged(candidate, None, "it has no schedule")
    seconds, held = found
    memory = {0: {"weights": held}}
    made = Prediction(seconds, 0.0, 0.0, None, memory, 0.0, 0.0, {}, None)  # type: ignore[arg-type]
    return Judged(candidate, made, "too large" if held > limit else None)


@FEW
@given(spaces())
def test_each_candidate_is_its_own_sketch(space: Space) -> None:
    tree = Tree(space, Toy(0, space), math.inf)
    for leaf in list(every(tree))[::5]:
        made = nearest(space, sketch_of(leaf.frame, tree.candidate(leaf)))
        assert made == tree.candidate(leaf)
        again = tree.leaf(leaf.frame, made)
        assert again == leaf and tree.candidate(again) == made
        assert tree.bounded(again).bound <= leaf.bound  # what branches above a leaf know is left out


@FEW
@given(spaces(), st.integers(0, 99), LIMITS)
def test_no_single_change_of_what_is_found_is_better(space: Space, seed: int, limit: float) -> None:
    check(space, seed, limit)


@pytest.mark.slow
@MANY
@given(spaces(), st.integers(0, 99), LIMITS)
def test_no_single_change_is_better_in_many_spaces(space: Space, seed: int, limit: float) -> None:
    check(space, seed, limit)


def check(space: Space, seed: int, limit: float) -> None:
    toy = Toy(seed, space)
    tree = Tree(space, toy, math.inf)
    found = finder(tree, toy, limit)
    for goal in goals(space, 1, limit)[:5]:
        found.find(goal, math.inf)
        fit = [(n, j) for n, j in found.seen.items() if goal.keep(n) and fits(j, goal)]
        if not fit:
            assert (closest(found.seen, goal) is None) == (not any(goal.keep(n) for n in found.seen))
            continue
        node, best = min(fit, key=lambda entry: entry[1].step_s)
        assert goal.name != "homogeneous" or best.candidate.homogeneous
        assert goal.name not in ("colocated", "disjoint", "mixed") or best.candidate.placement == goal.name
        for _, moved in moves(space, sketch_of(node.frame, best.candidate)):
            made = nearest(space, moved if goal.name != "homogeneous" else moved.follows())
            other = None if made is None else judged(toy, made, limit)
            leaf = None if made is None else tree.leaf(moved.frame, made)
            if other is not None and leaf is not None and goal.keep(leaf) and fits(other, goal):
                assert other.step_s >= best.step_s


def fits(found: Judged, goal: Goal) -> bool:
    return found.why is None and found.bytes <= goal.limit


def test_what_is_not_in_the_space_becomes_the_nearest_that_is() -> None:
    """Of 6 ranks, four pipeline ranks are not possible: three are, and the data ranks have what is there."""
    space = Space(6, 6, Limits(tp=(1, 2), pp=(1, 2, 3, 4), ep=(1, 2), layers=8), {}, 12)
    frame = space.frames[0]
    wanted = Sketch(frame, Degrees(pp=4, ep=2), "zero3", "interleaved", 100, (), ())
    made = nearest(space, wanted)
    assert made is not None
    assert made.sink.degrees == Degrees(pp=3, ep=2)
    assert made.kind == "1f1b" and made.microbatches == 6
