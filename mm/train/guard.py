"""What a run has seen of its own numbers: steps that were left out, losses that jumped, how it went back.

All of it follows from numbers that are equal on all ranks, so all decide alike. Checkpoints hold it, and a
run that resumes decides as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mm.config.training import TrainConfig
from mm.order.skips import NONE, Skips

WINDOW = 1000  # steps that train.max_nonfinite is of


@dataclass
class Guard:
    """skips: batches that the run leaves out. left_out: steps that were left out, of the last WINDOW. losses:
    of the last steps whose loss was not high. high: steps in a row, up to now, whose loss was. back: how many
    times the run went back."""

    train: TrainConfig
    skips: Skips = NONE
    left_out: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    high: int = 0
    back: int = 0

    @staticmethod
    def of(train: TrainConfig, skips: Skips, saved: Mapping[str, Any]) -> Guard:
        """That of a run which goes on from a checkpoint; of nothing at its start."""
        return Guard(train, skips, **saved)

    def saved(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"left_out": self.left_out, "losses": self.losses, "high": self.high, "back": self.back}

    def leaves_out(self, step: int) -> bool:
        """Whether a step, counted from 0, that is not finite is left out; otherwise the run ends."""
        self.left_out = [s for s in self.left_out if s > step - WINDOW]
        if self.train.nonfinite == "stop" or len(self.left_out) >= self.train.max_nonfinite:
            return False
        self.left_out.append(step)
        return True

    def jumped(self, loss: float) -> str:
        """In words, how the loss has jumped with the step that is done; "" where it has not. It is watched
        from the step on at which as many have been seen as the median is of."""
        rule = self.train.spike
        if rule is None:
            return ""
        usual = median(self.losses) if len(self.losses) >= rule.window else float("inf")
        if loss <= rule.factor * usual:
            self.high, self.losses = 0, [*self.losses, loss][-rule.window :]
            return ""
        self.high += 1
        if self.high < rule.steps:
            return ""
        high = f"above {rule.factor:g} times the median of {usual:.4g}"
        return f"the loss is {loss:.4g}, {high}, for {self.high} step{'s' * (self.high > 1)}"
