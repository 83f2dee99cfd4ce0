"""Training steps as data: actions, the generators that list them, and the executor."""

from parallel.schedule.action import Action, Kind
from parallel.schedule.colocated import colocated
from parallel.schedule.execute import Record, execute
from parallel.schedule.plan import ModuleUse, SchedulePlan

__all__ = ["Action", "Kind", "ModuleUse", "Record", "SchedulePlan", "colocated", "execute"]
