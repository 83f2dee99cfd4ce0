"""What a comparison of layouts shows: a record of each for its JSON, a table, and how sure a speed-up is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mm.compare.result import Interval, RunResult, SpeedupVerdict, StepSeconds

# Quantiles of Student's t by degrees of freedom, from 1: a mean's 95 % confidence interval reaches this many
# standard errors to either side. Beyond the last entry they are a little smaller.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
WIDE = 200  # columns of a table that goes to a file
FEWEST = 3  # ratios that an interval needs


@dataclass
class Measured:
    """What the rounds of one layout have measured.

    layout: as its file has it. rounds: by round, the seconds of its timed steps. tokens, boundary_bytes: of
    each timed step. losses, grad_norms (by module): of each step of the first round, warm-up included.
    """

    name: str
    layout: dict[str, Any]
    rounds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[Mapping[str, float]] = field(default_factory=list)
    boundary_bytes: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0

    @property
    def step_s(self) -> list[float]:
        """Seconds of every timed step."""
        return [seconds for steps in self.rounds for seconds in steps]


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |a - b| / |b| over pairs; |a| where b is 0."""
    return max((abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def speedup_interval(run: Measured, base: Measured) -> Interval | None:
    """The 95 % confidence interval of the true speed-up; None where there are too few steps.

    Equal steps of equal rounds do the same work, and rounds are interleaved. So their ratios depend neither
    on the data nor on a machine that slows down meanwhile. Rounds are independent. The steps of one round
    are less so: they count as independent only where there are too few rounds.
    """
    ratios = [
        [math.log(theirs / ours) for ours, theirs in zip(mine, others, strict=True)]
        for mine, others in zip(run.rounds, base.rounds, strict=True)
    ]
    logs = [statistics.mean(r) for r in ratios if r]
    if len(logs) < FEWEST:
        logs = [x for r in ratios for x in r]
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
    interval = speedup_interval(run, base) if run is not base else Interval(1.0, 1.0)
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
        boundary_bytes_per_step=statistics.mean(run.boundary_bytes) if run.boundary_bytes else 0,
        losses=run.losses,
        grad_norms_by_module=run.grad_norms,
        max_rel_loss_diff=relative_difference(run.losses, base.losses),
        max_rel_grad_norm_diff=max(norms, default=0.0),
        speedup=statistics.median(base.step_s) / median if run.step_s else 1.0,
        speedup_interval=interval,
        speedup_verdict=verdict(interval) if run is not base else "baseline",
    )


def table(summaries: Sequence[RunResult]) -> Table:
    """The comparison for people."""
    out = Table(title="same model, data, seed and batches; first row is the baseline", box=SIMPLE_HEAD)
    headings = ("step ms (min)", "tokens/s", "memory MiB", "boundary KiB/step", "loss diff", "grad norm diff")
    # Names are folded, never shortened: names of layouts often differ only at their ends.
    out.add_column("layout", overflow="fold")
    for heading in (*headings, "speed-up", "95 % interval"):
        out.add_column(heading, justify="right", overflow="fold")
    for run in summaries:
        cells = (
            run.name,
            f"{run.step_s.median * 1e3:.1f} ({run.step_s.min * 1e3:.1f})",
            f"{run.tokens_per_s:.0f}",
            f"{run.peak_memory_bytes / 2**20:.0f}",
            f"{run.boundary_bytes_per_step / 2**10:.1f}",
            f"{run.max_rel_loss_diff:.1e}",
            f"{run.max_rel_grad_norm_diff:.1e}",
            f"{run.speedup:.2f}x",
            _interval_text(run),
        )
        out.add_row(*cells)
    return out


def _interval_text(run: RunResult) -> str:
    interval = run.speedup_interval
    if interval is None or run.speedup_verdict == "baseline":
        return run.speedup_verdict
    noise = ", noise" if run.speedup_verdict == "within noise" else ""
    return f"{interval.low:.2f} to {interval.high:.2f}{noise}"
