"""Carries out plans: calls handlers in order, splits a backward in two halves, stands in for real work.

Only handlers decide what an action does to tensors.
"""

from parallel.schedule.executor.execute import execute
from parallel.schedule.executor.standin import run_standins

__all__ = [
    "execute",
    "run_standins",
]
