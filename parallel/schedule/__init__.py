"""A training step as data: actions, what lists them in order, and what proves, times, runs and draws them.

Schedules know modules by name and stages by number. No tensor may enter but in the executor.
"""

from parallel.schedule.action import Action, Group, Kind
from parallel.schedule.checker.check import check
from parallel.schedule.executor.execute import execute
from parallel.schedule.generators.make import make_schedule
from parallel.schedule.generators.problem import ScheduleOptions
from parallel.schedule.plan import ModuleUse, SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.costs import Costs, measured_costs
from parallel.schedule.simulator.simulate import Timeline, simulate

__all__ = [
    "Action",
    "Costs",
    "Group",
    "Kind",
    "ModuleUse",
    "Record",
    "ScheduleOptions",
    "SchedulePlan",
    "Timeline",
    "check",
    "execute",
    "make_schedule",
    "measured_costs",
    "simulate",
]
