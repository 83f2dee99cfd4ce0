"""Plans carried out: handlers of actions in order, a backward in two halves, and stand-ins for real work.

What an action does to tensors is its handler's affair.
"""

from parallel.schedule.executor.execute import execute
from parallel.schedule.executor.standin import run_standins

__all__ = [
    "execute",
    "run_standins",
]
