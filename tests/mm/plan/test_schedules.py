"""Schedules by pattern of active encoders: made once, checked, and taken from elsewhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mm.config.outline import schedule_of
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.plan.schedules import Pattern, Schedules
from parallel.schedule import SchedulePlan
from parallel.schedule.checker.check import PlanError
from tests.mm.harness import CONFIGS, running, small
from tests.mm.plan.test_select import sample
from tests.mm.shards import write_shard

ALL: Pattern = (frozenset({"vision", "audio"}), frozenset({"vision", "audio"}))
SOME: Pattern = (frozenset({"vision"}), frozenset())


def schedules(made: list[Pattern], keep: int = 32) -> Schedules:
    """The schedules of a job of four ranks. made: the patterns that it had to make."""
    raw = small(layout={"llm": {"pp": 2}}, schedule={"microbatches": 2})
    job = draw_up(from_mapping(raw, CONFIGS), 4)
    make = partial(schedule_of, job.cfg, job.uses)

    def recorded(active: Pattern, train: bool) -> SchedulePlan:
        made.append(active)
        return make(active, train=train)

    return Schedules(recorded, keep=keep)


def test_a_pattern_is_made_once_for_training_and_once_for_evaluation() -> None:
    made: list[Pattern] = []
    known = schedules(made)
    plan = known.get([{"audio", "vision"}, ["vision", "audio"]], train=True)
    assert known.get(ALL, train=True) is plan and made == [ALL]
    assert not known.get(ALL, train=False).train and made == [ALL, ALL]
    assert known.get(SOME, train=True).active == SOME


def test_those_that_were_not_used_for_longest_are_forgotten() -> None:
    made: list[Pattern] = []
    known = schedules(made, keep=2)
    one = known.get(ALL, train=True)
    known.get(SOME, train=True)
    assert known.get(ALL, train=True) is one  # used again, so the next one that goes is SOME
    known.get((frozenset(), frozenset()), train=True)
    assert known.get(ALL, train=True) is one and len(made) == 3
    known.get(SOME, train=True)
    assert len(made) == 4


def test_what_another_process_has_made_is_not_made_again() -> None:
    here: list[Pattern] = []
    there: list[Pattern] = []
    ours, theirs = schedules(here), schedules(there)
    sent = theirs.new(SOME)
    assert sent is not None and theirs.new(SOME) is None
    taken = pickle.loads(pickle.dumps(sent))
    ours.add(taken)
    assert ours.get(SOME, train=True) is taken and not here
    made = ours.get(ALL, train=True)
    assert taken.programs == sent.programs and taken.programs != made.programs
    # Handlers are found by kind, and members of a process group by its name: both survive the way.
    assert [a.kind is b.kind for (_, a), (_, b) in zip(taken, sent, strict=True)].count(False) == 0
    names = {name for _, a in taken for name in a.groups}
    assert all(taken.instances(name) == sent.instances(name) for name in names)


def test_a_schedule_that_cannot_run_is_refused() -> None:
    plan = schedules([]).get(ALL, train=True)
    broken = replace(plan, programs=tuple(program[1:] for program in plan.programs))
    with pytest.raises(PlanError):
        Schedules(lambda active, train: broken).get(ALL, train=True)


def steps_without_making(raw: dict[str, Any], steps: int) -> set[Pattern]:
    """The patterns of a few steps, of which this process may make no schedule but the first's."""
    with running(raw) as (job, feed):
        prepared, _ = feed.next(0, steps)
        refuse = mock.Mock(side_effect=AssertionError("made in the thread that trains"))
        seen = {job.blueprint.schedule(prepared.plan.active).active}
        with mock.patch.object(job.blueprint.schedules, "_make", refuse):
            for step in range(1, steps):
                prepared, _ = feed.next(step, steps)
                seen.add(job.blueprint.schedule(prepared.plan.active).active)
        return seen


def test_training_makes_them_in_the_process_that_plans(tmp_path: Path, alone: Callable[..., Any]) -> None:
    samples = [
        sample(f"s{k:02d}", "word", *[(8, 8)] * (k % 2)) for k in range(24)
    ]  # every other one has none
    shard = write_shard(tmp_path / "a-0.tar", samples)
    raw = small(data={"train": [str(shard)]}, train={"global_batch": 4}, schedule={"microbatches": 4})
    (seen,) = alone(1, steps_without_making, raw, 6)
    assert len(seen) > 2
