"""The last step of a search: from the best of every goal, one change after another that helps, of the
neighbours and of choices beside the searched space. It proves nothing: what it adopts is faster than what the
search has found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mm.search.candidate import Candidate
from mm.search.goals import Goal, homogeneous
from mm.search.neighbours import around
from mm.search.predictor import Judged
from mm.search.space import Space

SHARE = 0.1  # of the time of a search; what proofs do not need comes on top
LESS = 0.999  # times as long: what gives less is not worth a change

Found = Mapping[str, Sequence[Judged]]  # by goal, its best


@dataclass
class Polisher:
    """judge: predicts a candidate. known: what was predicted, by candidate. ends: where climbs have ended."""

    space: Space
    judge: Callable[[Candidate], Judged]
    known: dict[Candidate, Judged] = field(default_factory=dict)
    ends: set[Candidate] = field(default_factory=set)

    def every(self, goals: Sequence[Goal], found: Found, until: float, *, finish: bool = False) -> Found:
        """What each goal has after polishing: of all that is known its best few.

        Layouts alike for all modules have their turn first, so that the baseline is tuned as hard, and the
        first goal its last, from what the others have shown. until: processor time. finish: whether the
        first goal goes on until no change helps.
        """
        order = [g for g in goals[1:] if g.keep is homogeneous]
        order += [g for g in goals[1:] if g.keep is not homogeneous]
        order.append(goals[0])
        for k, goal in enumerate(order):
            start = self._best(goal, found, 1)
            if not start:
                continue
            now, weights = time.process_time(), [g.weight for g in order[k:]]
            turn = now + max(0.0, until - now) * weights[0] / sum(weights)
            if finish and goal is goals[0]:
                turn = math.inf
            self.ends.add(self.one(goal, start[0], turn).candidate)
        return {goal.name: self._best(goal, found, goal.k) for goal in goals}

    def one(self, goal: Goal, start: Judged, until: float) -> Judged:
        """The end of a climb from one candidate: no single change helps, or the processor time is reached."""
        best, tried = start, 0
        while True:
            changes = [c for _, c in around(self.space, best.candidate) if goal.suits(c)]
            # It goes on behind the change that has helped: all others are tried before the first ones again.
            for k in range(len(changes)):
                at = (tried + k) % len(changes)
                if changes[at] not in self.known:
                    if time.process_time() > until:
                        return best
                    self.known[changes[at]] = self.judge(changes[at])
                found = self.known[changes[at]]
                if goal.meets(found) and found.step_s < LESS * best.step_s:
                    best, tried = found, at + 1
                    break
            else:
                return best

    def _best(self, goal: Goal, found: Found, count: int) -> list[Judged]:
        """Of all that is known, a goal's: the fastest first, of equals what the search has found.

        Of what is beside the space only where a climb has ended: the rest differs by next to nothing. And
        of that only the fastest, as `count` layouts of a search are to differ in more.
        """
        every = {j.candidate: j for one in (found[goal.name], *found.values()) for j in one} | self.known
        mine = sorted((j for j in every.values() if goal.meets(j)), key=lambda j: j.step_s)
        mine = [j for j in mine if not j.candidate.unsearched or j.candidate in self.ends]
        return [j for k, j in enumerate(mine) if k == 0 or not j.candidate.unsearched][:count]
