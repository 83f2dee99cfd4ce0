"""Samples that turn out to be unreadable: what ranks tell each other of them, and how many are too many.

Samples are counted in the order in which they are drawn, which is the same on all ranks: those of a step as
they lie in its batch, then the ones that replace the bad ones. So neither the size of a batch nor the number
of ranks changes when a run ends.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mm.data.reader import BadSample

WINDOW = 1000  # samples that a share is taken of, the last that were drawn
IN_A_ROW = 100  # unreadable samples without a good one between them that end a run


class Skip(NamedTuple):
    """A sample that is left out and replaced from now on."""

    sample_id: int
    key: str
    shard: str
    why: str
    portion: str  # such as "2 of 3", of a sample that is split; "" for a whole one

    def __str__(self) -> str:
        portion = f" (portion {self.portion})" if self.portion else ""
        return f"sample {self.key}{portion} of {self.shard}: {self.why}"


def written(bad: Iterable[BadSample]) -> str:
    """What a rank tells the others."""
    return json.dumps([[b.sample_id, b.key, b.shard, b.why, b.portion] for b in bad])


def merged(reports: Sequence[str]) -> list[Skip]:
    """What all ranks say (written), by sample; where several know why, the first of them is believed."""
    found: dict[int, Skip] = {}
    for line in reports:
        for one in json.loads(line):
            skip = Skip(*one)
            found.setdefault(skip.sample_id, skip)
    return [found[n] for n in sorted(found)]


@dataclass(frozen=True)
class Listener:
    """Who hears what happens to a feed.

    warn: is given warnings. skip: is given the samples that a step, counted from 1, leaves out from then on;
    the same on all ranks.
    """

    warn: Callable[[str], object] = print
    skip: Callable[[int, Sequence[Skip]], object] = lambda step, skips: None


class Tally:
    """Says when too many of the samples that are drawn are unreadable.

    share: the largest share of the last WINDOW samples. Until as many have been drawn, the rest counts as
    good: a few bad samples at the start are no share.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._before: deque[bool] = deque(maxlen=WINDOW)  # of the steps that are done, whether each was bad
        self._step: dict[int, bool] = {}  # of this step, by sample

    def count(self, ids: Sequence[int], bad: Collection[int]) -> str | None:
        """Count the samples of a step as it is now planned, of which some have been found bad; returns why
        the run must end, if it must."""
        for i in ids:
            self._step.setdefault(i, False)
        if not bad:
            return None  # good samples break no bound
        self._step.update(dict.fromkeys(bad, True))
        drawn = [*self._before, *self._step.values()]
        row = max((len(list(run)) for is_bad, run in itertools.groupby(drawn) if is_bad), default=0)
        if row >= IN_A_ROW:
            return f"{row} unreadable samples in a row"
        last = drawn[-WINDOW:]
        if sum(last) > self._share * WINDOW:
            return (
                f"{sum(last)} of the last {len(last)} samples are unreadable, data.max_skipped allows "
                f"{self._share * WINDOW:g} of {WINDOW}"
            )
        return None

    def done(self) -> None:
        """The step's samples are all good now."""
        self._before.extend(self._step.values())
        self._step.clear()
