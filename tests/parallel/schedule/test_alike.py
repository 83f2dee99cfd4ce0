"""Layouts of one pattern have one schedule: made on one of them and moved, it is the other's own."""

from __future__ import annotations

import random

import pytest

from parallel.schedule import ModuleUse, SchedulePlan, make_schedule
from parallel.schedule.alike import moved, pattern_of
from parallel.schedule.checker.check import check
from parallel.schedule.checker.graph import graph_of
from parallel.topology.data_parallel import Shards
from parallel.topology.layout import Layout

SINK = "llm"


def uses(rng: random.Random, times: int, first: int) -> dict[str, ModuleUse]:
    """Random modules, on `times` as many ranks, of which the first is `first`. The same numbers give layouts
    that differ in these two alone."""
    tp, pp, where, params = (
        rng.choice(x) for x in ((1, 2), (1, 2), ("all", "first", "apart"), ("each", "step"))
    )
    size = 8 * times
    llm = Layout(SINK, tuple(range(first, first + size)), tp=tp, pp=pp, ep=rng.choice((1, 2)))
    vision = {
        "all": llm.ranks,
        "first": llm.ranks[: size // pp],
        "apart": tuple(range(first + size, first + 2 * size)),
    }[where]
    encoder = Layout("vision", vision, tp=rng.choice((1, 2)), pp=rng.choice((1, 2)))
    shards = Shards(llm.dp, llm.edp)
    return {
        "vision": ModuleUse(encoder),
        SINK: ModuleUse(llm, params=params, sums="step", experts=True, shards=shards),
    }


def made(modules: dict[str, ModuleUse]) -> SchedulePlan:
    active = [{"vision"}, {"vision"}, set[str](), {"vision"}]
    return make_schedule("1f1b", modules, sink=SINK, active=active)


def pairs() -> list[tuple[dict[str, ModuleUse], dict[str, ModuleUse]]]:
    """Modules on some ranks, and of one pattern on twice as many others. Where one data rank becomes two,
    it is another pattern."""
    both = [(uses(random.Random(seed), 1, 0), uses(random.Random(seed), 2, 3)) for seed in range(24)]
    return [(one, other) for one, other in both if pattern_of(one) == pattern_of(other)]


def test_most_layouts_on_twice_as_many_ranks_are_alike() -> None:
    assert len(pairs()) > 12


@pytest.mark.parametrize("nth", range(6))
def test_a_schedule_that_is_moved_is_that_of_the_other_ranks(nth: int) -> None:
    one, other = pairs()[nth]
    plan = made(one)
    check(plan)  # so that what is worked out from it is there
    there, own = moved(plan, other), made(other)
    assert there == own
    assert graph_of(there) == graph_of(own)
    check(there)


def test_what_changes_a_schedule_changes_the_pattern() -> None:
    patterns = {pattern_of(uses(random.Random(seed), 1, 0)): seed for seed in range(16)}
    plans = {str(made(uses(random.Random(seed), 1, 0)).programs) for seed in range(16)}
    assert len(patterns) >= len(plans) > 5
