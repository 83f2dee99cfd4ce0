"""When a run ends for its bad samples: it depends on the samples as they come, not on batches or ranks."""

from __future__ import annotations

import numpy as np
import pytest

from mm.data.reader import BadSample
from mm.data.sample import Part, Sample
from mm.ranks.skipped import IN_A_ROW, WINDOW, Tally, merged, written


def ends(flags: list[bool], batch: int, share: float, *, noticed: int = 10**9) -> tuple[int, str] | None:
    """After how many drawn samples a run ends, and why. A batch is drawn, then what replaces its bad samples;
    noticed: how many bad samples ranks find at once."""
    tally, at = Tally(share), 0
    while at + batch <= len(flags):
        now = list(range(at, at + batch))
        at += batch
        while True:
            bad = [i for i in now if flags[i]][:noticed]
            why = tally.count(now, bad)
            if why is not None:
                return at, why
            if not bad:
                break
            fresh = list(range(at, at + len(bad)))
            if fresh[-1] >= len(flags):
                return None
            now, at = [i for i in now if i not in bad] + fresh, at + len(bad)
        tally.done()
    return None


def first_breach(flags: list[bool], share: float) -> int | None:
    """The number of drawn samples at which a bound is first broken, by its definition."""
    for n in range(1, len(flags) + 1):
        window = flags[max(0, n - WINDOW) : n]
        if sum(window) > share * WINDOW or (n >= IN_A_ROW and all(flags[n - IN_A_ROW : n])):
            return n
    return None


@pytest.mark.parametrize(("rate", "share"), [(0.3, 0.35), (0.4, 0.35), (0.9, 0.35), (0.1, 0.01), (0.9, 1.0)])
def test_the_size_of_a_batch_does_not_change_when_a_run_ends(rate: float, share: float) -> None:
    flags = (np.random.default_rng(3).random(1500) < rate).tolist()
    expected = first_breach(flags, share)
    for batch, noticed in ((1, 10**9), (8, 10**9), (8, 3), (256, 10**9), (256, 14)):
        found = ends(flags, batch, share, noticed=noticed)
        assert (found is None) == (expected is None), (batch, found, expected)
        if found is not None and expected is not None:
            # It is noticed when a batch, or what replaces its bad samples, has been read; nearly at once.
            assert expected <= found[0] <= expected + 2 * batch + noticed % 10**9


def test_a_row_of_bad_samples_ends_a_run_whatever_the_share() -> None:
    for batch in (7, 50, 256):
        good, bad = [False] * 300, [True] * (IN_A_ROW - 1)
        assert ends([*good, *bad, *good, *bad, *good], batch, 1.0) is None
        found = ends([*good, *bad, True, True, *[True] * 600, *good], batch, 1.0)
        assert found is not None and "unreadable samples in a row" in found[1]
    said = Tally(0.01).count(range(20), range(3, 14))
    assert said == "11 of the last 20 samples are unreadable, data.max_skipped allows 10 of 1000"


def test_ranks_tell_each_other_of_their_samples() -> None:
    def bad(n: int, why: str) -> BadSample:
        part = Part("a.tar", "json", 0, 1, "", {})
        return BadSample(Sample(n, f"k\u00e9{n}", "a.tar", (), part), why)

    told = [written([bad(5, "torn"), bad(2, "x")]), written([]), written([bad(5, "other"), bad(9, "y")])]
    assert [(s.sample_id, s.why) for s in merged(told)] == [(2, "x"), (5, "torn"), (9, "y")]
    assert str(merged(told)[0]) == "sample k\u00e92 of a.tar: x"
