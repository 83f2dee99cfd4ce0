"""The executor: carries out a list of actions and times each kind of work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from parallel.schedule.action import Action, Kind

Handler = Callable[[Action], None]


def execute(actions: Sequence[Action], handlers: Mapping[Kind, Handler]) -> dict[tuple[Kind, str], float]:
    """Run `actions` in order; returns the seconds spent by (kind, module).

    The times are host times. On an accelerator they measure issue, not execution, of asynchronous work.
    """
    seconds: dict[tuple[Kind, str], float] = defaultdict(float)
    for action in actions:
        start = time.perf_counter()
        handlers[action.kind](action)
        seconds[action.kind, action.module] += time.perf_counter() - start
    return dict(seconds)
