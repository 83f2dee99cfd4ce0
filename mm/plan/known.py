"""What blueprints of one model have in common, found once: weights of stages, and schedules.

A search draws up hundreds of blueprints that differ in layout, schedule and recomputation alone. The weights
of a stage follow from a few degrees, and what ranks do in a step from where modules lie beside each other, so
most blueprints need nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mm.config.outline import schedule_of
from mm.config.schema import Config
from mm.plan.schedules import Pattern
from parallel.schedule import ModuleUse, SchedulePlan
from parallel.schedule.alike import moved, pattern_of

T = TypeVar("T")


@dataclass(frozen=True)
class Known:
    """Of one model, data set and training: configs that differ in `layout`, `schedule` and `train.recompute`
    may share it, and no others."""

    _found: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, the first time that it is asked for."""
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found

    def schedule(
        self, cfg: Config, uses: Mapping[str, ModuleUse], active: Pattern, *, train: bool
    ) -> SchedulePlan:
        """The schedule that a config asks for (mm.config.outline.schedule_of)."""
        asked = cfg.schedule
        options = asked.kind, asked.ahead, tuple(asked.encoder_batch.items()), asked.overlap_experts
        key = "schedule", cfg.run.engine, options, active, train, pattern_of(uses)
        return moved(self.get(key, lambda: schedule_of(cfg, uses, active, train=train)), uses)
