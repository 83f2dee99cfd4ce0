"""The last step of a search, on made-up costs: what it adopts is faster, fits, and is of its goal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from mm.predict.step import Prediction
from mm.search.candidate import Block, Candidate, Choice, Degrees
from mm.search.goals import Goal, goals
from mm.search.neighbours import around, unsearched
from mm.search.polish import LESS, Polisher
from mm.search.predictor import Judged
from mm.search.space import Limits, Space

SPACE = Space(4, 4, Limits(tp=(1, 2), ep=(1, 2), layers=4), {"a": Limits(tp=(1, 2))}, 8)
Cost = Callable[[Candidate], tuple[float, float]]  # seconds and bytes


def candidate(tp: int = 1, policy: str = "zero3", ep: int = 2) -> Candidate:
    block = Block(0, 4)
    encoder = Choice(block, Degrees(tp, sequence_parallel=tp > 1), policy)
    return Candidate(4, (("a", encoder), ("llm", Choice(block, Degrees(ep=ep), "zero3"))), "1f1b", 1)


def judge(cost: Cost, of: Candidate, room: float = 10.0) -> Judged:
    seconds, held = cost(of)
    made = Prediction(seconds, 0.0, 0.0, None, {0: {"weights": held}}, 0.0, 0.0, {}, None)  # type: ignore[arg-type]
    return Judged(of, made, "too large" if held > room else None)


def polished(cost: Cost, start: Candidate, until: float = math.inf) -> dict[str, Judged]:
    polisher = Polisher(SPACE, lambda c: judge(cost, c))
    every = goals(SPACE, 1, 10.0)
    first = judge(cost, start)
    found = {g.name: (first,) if g.meets(first) else () for g in every}
    return {name: js[0] for name, js in polisher.every(every, found, until).items() if js}


def saving(of: Candidate) -> tuple[float, float]:
    """Each choice beside the space saves a little and takes memory; tp of the encoder alone saves most."""
    replicas = sum(c.data_parallel == "replicate" for _, c in of.choices)
    zero2 = sum(c.data_parallel == "zero2" for _, c in of.choices)
    seconds = 8.0 - 0.2 * replicas - 0.1 * zero2 - 0.3 * of.overlap_experts
    return seconds - (of.by_module["a"].degrees.tp > of.sink.degrees.tp), 2.0 + 4.5 * replicas + 0.1 * zero2


def test_choices_beside_the_space_are_adopted_where_they_fit() -> None:
    found = polished(saving, candidate())
    best, alike, tight = found["best"].candidate, found["homogeneous"], found["25% of the memory"]
    # Two replicas do not fit in 10 bytes; of one, zero2 for the other is the next best.
    assert sorted(c.data_parallel for _, c in best.choices) == ["replicate", "zero2"]
    assert best.overlap_experts and best.by_module["a"].degrees.tp == 2 and not best.homogeneous
    assert set(best.unsearched) == {
        *(f"layout.{m}.data_parallel={c.data_parallel}" for m, c in best.choices),
        "schedule.overlap_experts=true",
    }
    assert alike.candidate.homogeneous and alike.step_s == pytest.approx(8 - 0.2 - 0.1 - 0.3)
    assert tight.bytes <= 2.5 and tight.step_s == pytest.approx(8 - 0.2 - 0.3 - 1)


def test_no_single_change_of_what_is_polished_is_better() -> None:
    found = polished(saving, candidate())
    for goal in (g for g in goals(SPACE, 1, 10.0) if g.name in found):
        for _, near in around(SPACE, found[goal.name].candidate):
            other = judge(saving, near)
            assert not goal.meets(other) or other.step_s >= LESS * found[goal.name].step_s


def test_nothing_is_predicted_once_the_time_is_up_unless_it_is_to_settle() -> None:
    asked: list[Candidate] = []

    def cost(of: Candidate) -> Judged:
        asked.append(of)
        return judge(saving, of)

    start, every = judge(saving, candidate()), goals(SPACE, 1, 10.0)
    found = {g.name: (start,) for g in every}
    polisher = Polisher(SPACE, cost)
    assert polisher.every(every, found, 0.0)["best"] == [start] and not asked
    assert polisher.every(every, found, 0.0, finish=True)["best"][0].step_s < start.step_s and asked


def test_what_is_no_faster_is_not_adopted() -> None:
    start = judge(lambda of: (1.0, 1.0), candidate())
    polisher = Polisher(SPACE, lambda c: judge(lambda of: (1.0, 1.0), c))
    assert polisher.one(Goal("best", 1, 10.0), start, math.inf) is start


def test_what_is_beside_is_what_the_space_leaves_out() -> None:
    start = candidate()
    names = [what for what, _ in unsearched(SPACE, start)]
    assert names == [
        *(f"{m} data_parallel={p}" for m in ("a", "llm") for p in ("replicate", "zero1", "zero2")),
        "schedule.overlap_experts=true",
    ]
    alone = replace(start, choices=tuple((m, Choice(Block(0, 1), Degrees(), "zero3")) for m in ("a", "llm")))
    assert not list(unsearched(SPACE, alone))  # of one data rank all policies are one
