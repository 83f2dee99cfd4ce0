"""The rules, without processes: hosts that post and wait in any order, and what the referee makes of it."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strict.calls import Call, Comm, Op
from tests.strict.referee import Broken, Referee


class Step(NamedTuple):
    """A call of a host. waits: whether it waits for it at once; else after its last one."""

    comm: Comm
    ops: tuple[Op, ...]
    waits: bool = False


Scripts = dict[int, list[Step]]  # by rank


def send(peer: int, n: int = 1) -> Op:
    return Op("send", n, "float32", peer)


def recv(peer: int, n: int = 1) -> Op:
    return Op("recv", n, "float32", peer)


def play(scripts: Scripts, *, eager: bool, seed: int = 0) -> str | None:
    """Run hosts in a random order until none can go on: what the referee says of those that are not at their
    ends. None where all are."""
    rng, world = random.Random(seed), len(scripts)
    referee, at = Referee(world, eager), dict.fromkeys(scripts, 0)
    passed: set[tuple[int, int]] = set()
    done: set[tuple[int, int]] = set()

    def blocked(r: int) -> bool:
        k = at[r]  # calls posted so far: the last one has number k
        if k and (r, k) not in passed:
            return True
        if k and scripts[r][k - 1].waits and (r, k) not in done:
            referee.wait(r, k)
            return True
        if k == len(scripts[r]):
            late = [n for n in range(1, k + 1) if (r, n) not in done]
            for n in late:
                referee.wait(r, n)
            if not late:
                referee.leave(r)
            return True
        return False

    while free := [r for r in scripts if not blocked(r)]:
        r = rng.choice(free)
        step = scripts[r][at[r]]
        at[r] += 1
        for reply in referee.post(r, Call(at[r], step.comm, step.ops, "comm", batch=len(step.ops) > 1)):
            if reply.kind != "start":
                (passed if reply.kind == "passed" else done).add((reply.rank, reply.number))
    if len(referee.left) == world:
        return None
    assert referee.stuck()
    return referee.verdict()


TWO, THREE = Comm("g", (0, 1)), Comm("g", (0, 1, 2))
PAIR = Comm("g", (0, 1), pair=True)
ALL = Op("all_reduce", 4, "float32", detail="sum")

# (scripts, whether they end where groups are made lazily, where they are bound to the device)
CASES: dict[str, tuple[Scripts, bool, bool]] = {
    "a message": ({0: [Step(TWO, (send(1),))], 1: [Step(TWO, (recv(0),))]}, True, True),
    "crossed sends": (
        {r: [Step(TWO, (send(1 - r),)), Step(TWO, (recv(1 - r),))] for r in (0, 1)},
        False,
        False,
    ),
    "crossed sends between ranks that have exchanged messages": (
        {
            r: [
                Step(TWO, (send(1 - r), recv(1 - r)), True),
                Step(TWO, (send(1 - r),)),
                Step(TWO, (recv(1 - r),)),
            ]
            for r in (0, 1)
        },
        False,
        False,
    ),
    "a mirrored batch": ({r: [Step(TWO, (send(1 - r), recv(1 - r)))] for r in (0, 1)}, True, True),
    "a message to itself, in a batch": (
        {
            0: [Step(TWO, (ALL,)), Step(TWO, (send(0), recv(0)))],
            1: [Step(TWO, (ALL,)), Step(TWO, (recv(1), send(1)))],
        },
        True,
        True,
    ),
    "a send without a receive": ({0: [Step(TWO, (send(1),))], 1: []}, False, False),
    "a first batch of some members": (
        {0: [Step(THREE, (send(1),))], 1: [Step(THREE, (recv(0),))], 2: []},
        False,
        True,
    ),
    "a later batch of some members": (
        {
            0: [Step(THREE, (ALL,)), Step(THREE, (send(1),))],
            1: [Step(THREE, (ALL,)), Step(THREE, (recv(0),))],
            2: [Step(THREE, (ALL,))],
        },
        True,
        True,
    ),
    "a collective before a message, and after it": (
        {0: [Step(TWO, (ALL,)), Step(TWO, (send(1),))], 1: [Step(TWO, (recv(0),)), Step(TWO, (ALL,))]},
        False,
        False,
    ),
    "a batched send, an unbatched receive": (
        {0: [Step(TWO, (send(1),))], 1: [Step(PAIR, (recv(0),))]},
        False,
        False,
    ),
    "groups in opposite orders, waited for": (
        {
            0: [Step(TWO, (ALL,), True), Step(TWO._replace(group="h"), (ALL,), True)],
            1: [Step(TWO._replace(group="h"), (ALL,), True), Step(TWO, (ALL,), True)],
        },
        False,
        False,
    ),
    "a first batch, one of whose peers waits for the other": (
        {
            0: [Step(THREE, (ALL,), True), Step(THREE, (send(1), send(2)))],
            1: [Step(THREE, (ALL,), True), Step(THREE, (recv(0),), True), Step(THREE, (send(2),))],
            2: [Step(THREE, (ALL,), True), Step(THREE, (recv(1),), True), Step(THREE, (recv(0),))],
        },
        False,  # hosts connect with all peers of a batch, and rank 2 comes to 0 late
        False,
    ),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_ends_and_what_hangs(name: str, eager: bool) -> None:
    scripts, lazily, bound = CASES[name]
    for seed in range(5):
        assert (play(scripts, eager=eager, seed=seed) is None) == (bound if eager else lazily)


def test_peers_of_a_batch_progress_independently() -> None:
    meet = [Step(THREE, (ALL,)), Step(THREE, (ALL,))]
    scripts = {
        0: [*meet, Step(THREE, (send(1), send(2)), True), Step(THREE, (send(1), send(2)))],
        1: [*meet, Step(THREE, (recv(0),), True), Step(THREE, (send(2),), True), Step(THREE, (recv(0),))],
        2: [*meet, Step(THREE, (recv(0),), True), Step(THREE, (recv(1),), True), Step(THREE, (recv(0),))],
    }
    assert play(scripts, eager=True) is None


def test_two_ranks_connect_both_directions_with_one_message() -> None:
    scripts = {0: [Step(TWO, (send(1), recv(1)))], 1: [Step(TWO, (recv(0),)), Step(TWO, (send(0),))]}
    with pytest.raises(Broken, match=r"one message, but rank \d does .* where rank \d does"):
        play(scripts, eager=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        (send(1, 4), recv(0, 3), r"message 0 -> 1: rank \d does .*, rank \d does .*"),
        (ALL, ALL._replace(kind="broadcast"), "all_reduce .* broadcast|broadcast .* all_reduce"),
        (ALL, ALL._replace(numel=5), r"rank 0 does all_reduce \(sum\) \[4 float32\], rank 1 does .*\[5"),
        (ALL, ALL._replace(detail="max"), "sum.*max"),
        (ALL, ALL._replace(dtype="float64"), "float32.*float64"),
        (
            Op("all_to_all", 0, "int64", splits=((1, 2), (1, 3))),
            Op("all_to_all", 0, "int64", splits=((4, 1), (2, 1))),
            "rank 1 sends 4 elements to rank 0, which takes 3",
        ),
    ],
)
def test_operations_that_do_not_fit_are_named(ours: Op, theirs: Op, text: str) -> None:
    with pytest.raises(Broken, match=text):
        play({0: [Step(TWO, (ours,))], 1: [Step(TWO, (theirs,))]}, eager=True)


def test_the_verdict_names_the_ring_and_what_each_rank_is_at() -> None:
    crossed = {r: [Step(TWO, (ALL,)), *CASES["crossed sends"][0][r]] for r in (0, 1)}
    text = play(crossed, eager=True) or ""
    assert "ring: 0 -> 1 -> 0" in text
    assert "rank 0 waits in the host at send to 1 [1 float32] on comm for rank 1 to connect 0 -> 1" in text
    lost = play(CASES["a send without a receive"][0], eager=True) or ""
    assert "rank 1 has come to its end" in lost and "ring" not in lost


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Scripts, int]:
    """Calls of 4 ranks in one global order, in which every host comes to them; and a seed."""
    world = 4
    scripts: Scripts = {r: [] for r in range(world)}
    groups = [
        Comm(name, tuple(sorted(draw(st.sets(st.integers(0, 3), min_size=2))))) for name in ("a", "b", "c")
    ]
    for _ in range(draw(st.integers(1, 12))):
        comm = draw(st.sampled_from(groups))
        waits = {r: draw(st.booleans()) for r in comm.ranks}
        pairs = draw(st.lists(st.tuples(*[st.sampled_from(comm.ranks)] * 2), max_size=4))
        pairs = [(a, b) for a, b in pairs if a != b]
        ops = {r: (ALL,) for r in comm.ranks}
        if pairs:
            ops = {
                r: (*(send(b) for a, b in pairs if a == r), *(recv(a) for a, b in pairs if b == r))
                for r in comm.ranks
            }
        for r in comm.ranks:
            if ops[r]:
                scripts[r].append(Step(comm, ops[r], waits[r]))
    return scripts, draw(st.integers(0, 1000))


@given(jobs())
@settings(max_examples=60)
def test_calls_in_one_order_on_all_ranks_end(job: tuple[Scripts, int]) -> None:
    scripts, seed = job
    assert play(scripts, eager=True, seed=seed) is None
    comms = {step.comm for steps in scripts.values() for step in steps}
    for comm in sorted(comms):  # a first use by all members, without which a batch of some would wait for all
        for r in comm.ranks:
            scripts[r].insert(0, Step(comm, (ALL,)))
    assert play(scripts, eager=False, seed=seed) is None


@given(jobs(), st.data())
@settings(max_examples=60)
def test_whether_a_job_ends_does_not_depend_on_who_is_fast(
    job: tuple[Scripts, int], data: st.DataObject
) -> None:
    scripts, seed = job
    for steps in scripts.values():
        if data.draw(st.booleans()) and len(steps) > 1:  # two calls change places on one rank
            k = data.draw(st.integers(0, len(steps) - 2))
            steps[k : k + 2] = steps[k : k + 2][::-1]
    for eager in (False, True):
        ends = set()
        for order in range(4):
            try:
                ends.add(play(scripts, eager=eager, seed=seed + order) is None)
            except Broken:
                ends.add(False)
        assert len(ends) == 1
