"""The record of an executed action: what costs, drawings and traces are made from."""

from __future__ import annotations

from typing import NamedTuple

from parallel.schedule.action import Action


class Record(NamedTuple):
    """An action that was carried out, with host times of time.perf_counter() in seconds.

    ready: when its inputs were there; equal to `start` if its handler does not report it.
    """

    action: Action
    start: float
    end: float
    ready: float
