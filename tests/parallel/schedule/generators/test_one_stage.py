"""The schedule where all modules share their ranks and the sink has one stage: encoders forward, boundaries,
sink forward and backward, boundaries and encoders backward, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from parallel.schedule import Action, Kind, ModuleUse, ScheduleOptions, execute, make_schedule
from parallel.topology.layout import Layout


def colocated(
    active: Sequence[Collection[str]],
    *,
    sources: Sequence[str],
    sink: str,
    frozen: Collection[str] = (),
    train: bool = True,
) -> tuple[Action, ...]:
    uses = {m: ModuleUse(Layout(m, (0,)), frozen=m in frozen) for m in (*sources, sink)}
    options = ScheduleOptions(train=train)
    return make_schedule("auto", uses, sink=sink, active=active, options=options).actions(0)


def words(actions: tuple[Action, ...]) -> list[str]:
    return [str(a) for a in actions]


def test_a_module_is_skipped_where_it_has_no_items_and_reduces_once() -> None:
    got = words(colocated([{"vision"}, {"vision", "audio"}, set()], sources=["vision", "audio"], sink="llm"))
    assert "forward(audio, 0)" not in got and "forward(vision, 2)" not in got
    assert [w for w in got if "last" in w] == [
        "backward(vision, 1, last)",
        "backward(audio, 1, last)",
        "backward(llm, 2, last)",
    ]


def test_forward_comes_before_backward_and_boundaries_between() -> None:
    got = words(colocated([{"vision"}], sources=["vision"], sink="llm"))
    assert got == [
        "forward(vision, 0)",
        "boundary_forward(vision, 0)",
        "forward(llm, 0)",
        "backward(llm, 0, last)",
        "boundary_backward(vision, 0)",
        "backward(vision, 0, last)",
    ]


def test_frozen_modules_send_and_do_nothing_back() -> None:
    both = {"sources": ["vision", "audio"], "sink": "llm"}
    got = words(colocated([{"vision", "audio"}], **both, frozen={"audio"}))
    assert not [w for w in got if "backward" in w and "audio" in w]
    got = words(colocated([{"vision"}], **both, frozen={"vision", "audio", "llm"}))
    assert not [w for w in got if "backward" in w]
    got = words(colocated([{"vision"}], **both, frozen={"llm"}))
    assert "backward(llm, 0, last)" in got  # gradients pass through a frozen language model


def test_evaluation_only_goes_forward() -> None:
    got = colocated([{"vision"}], sources=["vision"], sink="llm", train=False)
    assert not [a for a in got if a.kind in (Kind.BACKWARD, Kind.BOUNDARY_BACKWARD)]


def test_the_executor_keeps_order_and_time() -> None:
    seen: list[Action] = []
    actions = colocated([{"vision"}, {"vision"}], sources=["vision"], sink="llm")
    seconds = execute(actions, dict.fromkeys(Kind, seen.append))
    assert tuple(seen) == actions and set(seconds) == {(a.kind, a.module) for a in actions}
