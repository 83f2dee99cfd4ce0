"""The schedules of a job: one for each pattern of active encoders, made and checked once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from parallel.schedule import SchedulePlan
from parallel.schedule.checker.check import check

CHECKED = "checked"  # in the memo of a plan that has been
Pattern = tuple[frozenset[str], ...]  # by micro-batch, the encoders that have items in it on any rank


class Schedules:
    """Checked schedules, of which the last `keep` that were used are remembered.

    A schedule costs up to seconds of Python for a thousand ranks, and a step whose micro-batches lack an
    encoder has a pattern of its own. Training therefore makes them where it plans (mm/ranks/planner.py).

    make: the schedule of a pattern, in training or not. Raises ValueError (Unfit) where none fits.
    """

    def __init__(self, make: Callable[[Pattern, bool], SchedulePlan], *, keep: int = 32) -> None:
        self._make, self._keep = make, keep
        self._known: OrderedDict[tuple[Pattern, bool], SchedulePlan] = OrderedDict()

    def get(self, active: Sequence[Collection[str]], *, train: bool) -> SchedulePlan:
        """The schedule of a pattern; one that is remembered is the same object."""
        pattern = tuple(frozenset(a) for a in active)
        plan = self._known.pop((pattern, train), None)
        if plan is None:
            plan = self._make(pattern, train)
            if CHECKED not in plan.memo:
                check(plan)
                plan.memo[CHECKED] = True
        self.add(plan)
        return plan

    def new(self, active: Sequence[Collection[str]]) -> SchedulePlan | None:
        """The schedule of a step of training, to be given to add() elsewhere; None where it is remembered."""
        if (tuple(frozenset(a) for a in active), True) in self._known:
            return None
        return self.get(active, train=True)

    def add(self, plan: SchedulePlan) -> None:
        """Remember a checked schedule, and forget the one that was not used for longest."""
        self._known[plan.active, plan.train] = plan
        while len(self._known) > self._keep:
            self._known.popitem(last=False)
