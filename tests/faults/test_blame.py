"""Who is to blame: random jobs in which one rank stops, hangs, ends, or holds the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mm.faults.blame import SILENT_S, Post, Seen, Verdict, blame

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Rank:
    """A rank of a made-up job. waits_s: since when it waits for others; 0: it does not. late_s: how old its
    last post is, as of any rank that lives."""

    waits_s: float
    late_s: float
    works_s: float = 0.0


innocents = st.lists(
    st.builds(Rank, st.floats(TIMEOUT_S / 2, TIMEOUT_S + 2), st.floats(0, 2.0)), min_size=1, max_size=7
)
busy = st.builds(Rank, st.just(0.0), st.floats(0, 2.0), st.floats(0, TIMEOUT_S / 4))


def posts(ranks: list[Rank]) -> list[Seen]:
    def post(one: Rank) -> Post:
        return Post(
            9, "llm, forward", waits=one.waits_s > 0, site="all_reduce", still_s=one.waits_s or one.works_s
        )

    return [Seen(r, post(one), one.late_s) for r, one in enumerate(ranks)]


def judged(ranks: list[Seen], at: int, culprit: Seen) -> Verdict:
    """The verdict on the ranks with the culprit among them."""
    return blame([*ranks[:at], culprit._replace(rank=100), *ranks[at:]])


@given(innocents, st.lists(busy, max_size=2), st.integers(0, 9), st.booleans(), st.floats(0, 3))
def test_a_silent_rank_is_to_blame_whatever_it_said_last(
    others: list[Rank], more: list[Rank], at: int, waited: bool, before_s: float
) -> None:
    stopped_s = max(r.waits_s + r.late_s for r in others) + 0.5
    culprit = Seen(0, Post(3, "sensor, forward", waits=waited, still_s=before_s), stopped_s)
    found = judged(posts([*others, *more]), at % (len(others) + 1), culprit)
    assert found.rank == 100 and found.sure and "silent" in found.why and "sensor, forward" in found.why


@given(innocents, st.lists(busy, max_size=2), st.integers(0, 9), st.floats(0, 2))
def test_a_rank_at_its_own_work_is_to_blame(
    others: list[Rank], more: list[Rank], at: int, late_s: float
) -> None:
    hangs_s = max(r.waits_s + r.late_s for r in others) + 0.5
    culprit = Seen(0, Post(30, "sensor, forward", still_s=hangs_s), late_s)
    found = judged(posts([*others, *more]), at % (len(others) + 1), culprit)
    assert (
        found.rank == 100
        and found.sure
        and found.why == f"hangs for {hangs_s + late_s:.0f} s in sensor, forward; others wait for it"
    )


@given(innocents, st.integers(0, 9), st.floats(0, 2), st.sampled_from(["stopped", "ended"]))
def test_a_rank_whose_process_ended_or_was_stopped_comes_first(
    others: list[Rank], at: int, late_s: float, how: str
) -> None:
    # Another one fell silent too: as a consequence, or later.
    ranks = posts(others)
    ranks[0] = ranks[0]._replace(silent_s=SILENT_S + 1)
    ended = "ended without a word" if how == "ended" else ""
    culprit = Seen(0, Post(3, "update", waits=True), late_s, ended, stopped=how == "stopped")
    found = judged(ranks, at % (len(others) + 1), culprit)
    assert found.rank == 100 and found.sure


@given(innocents)
def test_who_only_waits_is_innocent(others: list[Rank]) -> None:
    found = blame(posts(others))
    assert found.rank is None and "all ranks wait for each other: rank 0 in llm" in found.why


@given(innocents, busy)
def test_short_work_is_not_surely_to_blame(others: list[Rank], one: Rank) -> None:
    """A rank between two waits is seen at work now and then."""
    ranks = posts([*others, Rank(0.0, 0.0, min(one.works_s, SILENT_S - 0.1))])
    assert not blame(ranks).sure


@given(innocents)
def test_who_has_left_is_innocent(others: list[Rank]) -> None:
    gone = Seen(50, Post(30, "the end", done=True), 99.0, "ended without a word")
    assert blame([*posts(others), gone]).rank is None


def test_a_pause_that_is_shorter_than_half_of_the_wait_is_no_reason() -> None:
    waits = posts([Rank(TIMEOUT_S, 0.5)])
    paused = Seen(1, Post(20, "update", waits=True, still_s=12.0), SILENT_S + 1)
    hangs = Seen(2, Post(30, "sensor, forward", still_s=TIMEOUT_S + 1))
    assert blame([*waits, paused, hangs]).rank == 2


def test_posts_survive_the_store() -> None:
    post = Post(3, 'sensor "a", forward', waits=True, site="wait", still_s=1.5, calls="why")
    assert Post.parse(post.dump()) == post and Post.parse("-") is None
