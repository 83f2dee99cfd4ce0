"""What an executor tells of an action, and what costs, drawings and traces are made of."""

from __future__ import annotations

from typing import NamedTuple

from parallel.schedule.action import Action


class Record(NamedTuple):
    """An action that was carried out, with host times of time.perf_counter() in seconds.

    ready: when it had what it waited for; `start` where its handler does not say.
    """

    action: Action
    start: float
    end: float
    ready: float
