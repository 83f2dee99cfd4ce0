"""A training step as data: generators list its actions in order; the others check, time, run and draw them.

Schedules know modules by name and stages by number. Only the executor may see tensors.
"""

from parallel.schedule.action import Action, Kind
from parallel.schedule.checker.check import check
from parallel.schedule.executor.execute import execute
from parallel.schedule.generators.make import make_schedule
from parallel.schedule.generators.problem import ScheduleOptions
from parallel.schedule.plan import ModuleUse, SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.costs import Costs, measured_costs
from parallel.schedule.simulator.simulate import Timeline, simulate
from parallel.topology.groups import Group

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
