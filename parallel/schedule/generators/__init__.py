"""Where plans come from: orders of computations on each pipeline rank, lowered to actions of all ranks.

Each generator is a pure function. What no schedule can do is refused here, in words.
"""

from parallel.schedule.generators.make import make_schedule
from parallel.schedule.generators.orders import PIPELINES
from parallel.schedule.generators.problem import ScheduleOptions

__all__ = [
    "PIPELINES",
    "ScheduleOptions",
    "make_schedule",
]
