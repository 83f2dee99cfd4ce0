"""Which checkpoints of a run stay: the newest, every so many steps, the best by a metric."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.config.schema import CheckpointConfig
from parallel import checkpoint as store


def metric_of(state: Mapping[str, Any], name: str) -> float | None:
    """A metric that a checkpoint was saved with; None where it has no such number."""
    metrics = state.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    # JSON has integers that are no float.
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def why_kept(
    steps: Sequence[int], metrics: Mapping[int, float], keep: int, keep_every: int
) -> dict[int, list[str]]:
    """Of each step that has a checkpoint, why that stays; an empty list where it goes.

    metrics: of the steps that have one; the lowest is the best, of equal ones the earliest. keep, keep_every:
    see CheckpointConfig.
    """
    last = set(sorted(steps)[-keep:] if keep else steps)
    best = min(metrics, key=lambda s: (metrics[s], s), default=None)
    return {
        step: [
            *(["last"] if step in last else []),
            *([f"every {keep_every}"] if keep_every and step % keep_every == 0 else []),
            *(["best"] if step == best else []),
        ]
        for step in steps
    }


def reasons(found: Sequence[Path], rules: CheckpointConfig) -> dict[Path, list[str]]:
    """why_kept() of checkpoints. One whose state is damaged has no metric."""
    metrics: dict[int, float] = {}
    for path in found if rules.keep_best is not None else ():
        assert rules.keep_best is not None
        try:
            value = metric_of(store.read_state(path), rules.keep_best)
        except store.BadCheckpoint:
            continue
        if value is not None:
            metrics[store.step_of(path)] = value
    why = why_kept([store.step_of(p) for p in found], metrics, rules.keep, rules.keep_every)
    return {path: why[store.step_of(path)] for path in found}


def rule_of(rules: CheckpointConfig) -> store.Stay:
    """Which of a run's checkpoints stay, when another has been published."""

    def stay(found: Sequence[Path]) -> Collection[Path]:
        return [path for path, why in reasons(found, rules).items() if why]

    return stay
