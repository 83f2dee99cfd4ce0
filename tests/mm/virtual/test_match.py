"""Traces matched under the rules of NCCL and of gloo: what hangs is found, and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mm.virtual.match import Channel, Program, match_programs
from mm.virtual.records import Call

PAIR = Channel("llm.pp.forward", (0, 1))
OTHER = Channel("llm.pp.backward", (0, 1))
BOTH = {"a": PAIR, "b": OTHER}


def call(op: str, peer: int | None = None, on: str = "a", size: int = 8, tag: int = 0) -> Call:
    return Call(
        op=op,
        group=BOTH[on].name,
        members=(0, 1),
        bytes=size,
        dtype="float32",
        crosses_nodes=False,
        communicator=on,
        peer=peer,
        sends=(),
        receives=(),
        during="somewhere",
        posted=True,
        tag=tag,
        batch=None,
        at=0,
    )


def program(rank: int, *steps: Call | Sequence[Call] | int) -> Program:
    """Calls, batches of calls, and numbers: wait for that post."""
    posts: list[tuple[Call, ...]] = []
    order = []
    for step in steps:
        if isinstance(step, int):
            order.append((False, step))
        else:
            posts.append((step,) if isinstance(step, Call) else tuple(step))
            order.append((True, len(posts) - 1))
    return Program(rank, order, posts, BOTH, BOTH)


def problems(a: Program, b: Program, buffered: bool = False) -> str:
    return "; ".join(match_programs([a, b], buffered=buffered).problems)


def test_equal_programs_meet() -> None:
    done = match_programs(
        [
            program(0, call("all_reduce"), call("send", 1), 0, 1),
            program(1, call("all_reduce"), call("recv", 0), 1),
        ]
    )
    assert done.ok and done.calls == 4


def test_two_sends_first_hang_on_nccl_alone() -> None:
    ranks = [program(r, call("send", 1 - r), call("recv", 1 - r), 1) for r in (0, 1)]
    assert "2 of 2 ranks wait for ever" in problems(*ranks)
    assert "behind send of llm.pp.forward to rank 1" in problems(*ranks)
    assert not problems(*ranks, buffered=True)


def test_a_batch_or_a_second_communicator_cures_it() -> None:
    assert not problems(*(program(r, [call("send", 1 - r), call("recv", 1 - r)], 0) for r in (0, 1)))
    a = program(0, call("send", 1), call("recv", 1, "b"), 1, 0)
    b = program(1, call("send", 0, "b"), call("recv", 0), 1, 0)
    assert not problems(a, b)


def test_two_communicators_in_two_orders_hang_where_both_are_waited_for() -> None:
    a = program(0, call("all_reduce"), 0, call("all_reduce", on="b"), 1)
    b = program(1, call("all_reduce", on="b"), 0, call("all_reduce"), 1)
    assert "wait for ever" in problems(a, b)
    both = program(0, call("all_reduce"), call("all_reduce", on="b"), 0, 1)
    assert not problems(both, b)  # on queues of their own, started before any wait


def test_tags_are_honoured_on_gloo_alone() -> None:
    a = program(0, call("send", 1, tag=1, size=8), call("send", 1, tag=2, size=16), 0, 1)
    b = program(1, call("recv", 0, tag=2, size=16), call("recv", 0, tag=1, size=8), 0, 1)
    assert not problems(a, b, buffered=True)
    assert "sends 8 bytes of float32 in somewhere, but rank 1 receives 16" in problems(a, b)


@pytest.mark.parametrize("change", [{"bytes": 16}, {"dtype": "bfloat16"}, {"op": "all_gather"}])
def test_a_collective_that_differs_is_named(change: dict[str, object]) -> None:
    one = call("all_reduce")
    other = replace(one, **change)  # type: ignore[arg-type]
    assert "llm.pp.forward" in problems(program(0, one, 0), program(1, other, 0))


def test_splits_must_mirror() -> None:
    a, b = (replace(call("all_to_all"), sends=s, receives=r) for s, r in (((1, 2), (1, 3)), ((3, 4), (2, 4))))
    assert not problems(program(0, a, 0), program(1, b, 0))
    odd = replace(b, receives=(5, 4))
    assert "rank 0 sends 2 bytes to rank 1" in problems(program(0, a, 0), program(1, odd, 0))


def test_what_nobody_meets_is_left_over() -> None:
    a = program(0, call("send", 1))
    assert "meets nothing" in problems(a, program(1))
    assert "left over" in problems(a, program(1), buffered=True)
