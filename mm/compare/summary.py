"""What the rounds of a layout have measured, its entry in the result, and how sure a speed-up is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm.compare.result import Edge, Interval, RunResult, SpeedupVerdict, StepSeconds
from mm.train.metrics import BoundaryMetrics, StepMetrics

# Quantiles of Student's t by degrees of freedom, from 1: a mean's 95 % confidence interval reaches this many
# standard errors to either side. Beyond the last entry they are a little smaller.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
FEWEST = 2  # rounds that an interval needs


@dataclass
class Measured:
    """What the rounds of one layout have measured.

    layout: as its file has it. rounds: by round, the seconds of its timed steps. tokens, flops (by module),
    imbalance (by module), boundary: of each timed step. losses, grad_norms (by module): of each step of the
    first round, warm-up included.
    """

    name: str
    layout: Mapping[str, Any]
    rounds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[Mapping[str, float]] = field(default_factory=list)
    imbalance: list[Mapping[str, float]] = field(default_factory=list)
    boundary: list[Mapping[str, BoundaryMetrics]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[Mapping[str, float]] = field(default_factory=list)
    peak_memory_bytes: int = 0

    def add(self, metrics: StepMetrics) -> None:
        """Take what a timed step has measured beside its seconds."""
        self.tokens.append(metrics.tokens)
        self.flops.append(metrics.flops_by_module)
        self.imbalance.append({m: found.dealt for m, found in metrics.imbalance.items()})
        self.boundary.append(metrics.boundary)

    def of_rounds(self, count: int) -> Measured:
        """What the first `count` rounds have measured: of the next one some steps may have been timed."""
        steps = sum(len(times) for times in self.rounds[:count])
        return replace(
            self,
            rounds=self.rounds[:count],
            tokens=self.tokens[:steps],
            flops=self.flops[:steps],
            imbalance=self.imbalance[:steps],
            boundary=self.boundary[:steps],
        )

    @property
    def step_s(self) -> list[float]:
        """Seconds of every timed step."""
        return [seconds for steps in self.rounds for seconds in steps]


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |a - b| / |b| over pairs; |a| where b is 0."""
    return max((abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def speedup_interval(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval | None:
    """The 95 % confidence interval of how many times as fast as `theirs` we are; None: too few rounds.

    ours, theirs: by round, the seconds of its steps. Equal steps of equal rounds do the same work, and rounds
    are interleaved. So their ratios depend neither on the data nor on a machine that slows down meanwhile.
    Rounds are independent. The steps of one round are not, however many there are: they go up and down
    together, so they prove nothing of the next round.
    """
    ratios = [
        [math.log(b / a) for a, b in zip(mine, others, strict=True)]
        for mine, others in zip(ours, theirs, strict=True)
    ]
    logs = [statistics.mean(r) for r in ratios if r]
    if len(logs) < FEWEST:
        return None
    t = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1]
    middle, error = statistics.mean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle - error), math.exp(middle + error))


def verdict(interval: Interval | None) -> SpeedupVerdict:
    """What an interval proves of the speed-up."""
    if interval is None:
        return "too few steps"
    return "faster" if interval.low > 1 else "slower" if interval.high < 1 else "within noise"


def summarise(run: Measured, base: Measured) -> RunResult:
    """A layout against the baseline."""
    times = run.step_s or [float("nan")]
    interval = speedup_interval(run.rounds, base.rounds) if run is not base else Interval(1.0, 1.0)
    median = statistics.median(times)
    norms = [
        relative_difference(list(a.values()), list(b.values()))
        for a, b in zip(run.grad_norms, base.grad_norms, strict=True)
    ]
    return RunResult(
        name=run.name,
        layout=run.layout,
        step_s=StepSeconds(median, min(times), max(times)),
        tokens_per_s=sum(run.tokens) / sum(run.step_s) if run.step_s else float("nan"),
        peak_memory_bytes=run.peak_memory_bytes,
        boundary_bytes_per_step=_mean([sum(e.bytes for e in step.values()) for step in run.boundary]),
        losses=run.losses,
        grad_norms_by_module=run.grad_norms,
        max_rel_loss_diff=relative_difference(run.losses, base.losses),
        max_rel_grad_norm_diff=max(norms, default=0.0),
        speedup=statistics.median(base.step_s) / median if run.step_s else 1.0,
        speedup_interval=interval,
        speedup_verdict=verdict(interval) if run is not base else "baseline",
        rounds=run.rounds,
        flops_by_module=_medians(run.flops),
        imbalance=_medians(run.imbalance),
        boundary={
            m: Edge(
                bytes=statistics.median(step[m].bytes for step in run.boundary),
                seconds=statistics.median(step[m].seconds for step in run.boundary),
            )
            for m in (run.boundary[0] if run.boundary else {})
        },
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, the median over the steps that have it."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: statistics.median(step[name] for step in steps if name in step) for name in names}
