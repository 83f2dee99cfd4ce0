"""Training steps as data: actions, the generators that list them, and the executor."""

from parallel.schedule.action import Action, Group, Kind
from parallel.schedule.executor.execute import execute
from parallel.schedule.generators.make import make_schedule
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
    "SchedulePlan",
    "Timeline",
    "execute",
    "make_schedule",
    "measured_costs",
    "simulate",
]
