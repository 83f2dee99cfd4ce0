"""Output of a run: a line a step, a progress bar, tables; metrics, skipped samples, log, boards."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mm.data.sample import Index
from mm.ranks.skipped import Skip
from mm.train.lines import Lines, forget_after

if TYPE_CHECKING:
    from mm.train.boards import Board
    from mm.train.evaluate import Evaluation
    from mm.train.metrics import StepMetrics, TimedStep


METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"


class Console:
    """Output of a run; ranks other than the lead write warnings alone.

    first: steps done before this start, whose metrics are kept. boards: get the numbers too, and are closed.
    """

    def __init__(self, run_dir: Path, steps: int, *, first: int, lead: bool) -> None:
        self.lead, self.steps, self._run_dir = lead, steps, run_dir
        self._rich = Rich(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self.boards: list[Board] = []
        if not lead:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        # A resumed run goes on in the same files; one from the start begins them anew.
        self._metrics = self._open(METRICS, first)
        self._skipped = self._open(SKIPPED, first, begin=not first)
        self._log = Lines(run_dir / "log.txt", self._warn, begin=not first)
        if self._rich.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._rich)
            self._task = self._progress.add_task("train", total=steps, completed=first)
            self._progress.start()
        self._began, self._first = time.monotonic(), first

    def _open(self, name: str, step: int, *, begin: bool = False) -> Lines:
        """A file of records, of which those after `step` are dropped."""
        forget_after(self._run_dir / name, step, self._warn)
        return Lines(self._run_dir / name, self._warn, begin=begin)

    def step(self, timed: TimedStep) -> None:
        """Show and write one step's metrics."""
        if not self.lead:
            return
        self._metrics.write(json.dumps(timed.to_json()) + "\n")
        metrics = timed.metrics
        self._say(step_line(timed, self.steps, self._eta(metrics.step)))
        if metrics.left_out:
            self.warn(f"{metrics.left_out}; the weights stay as they were (train.nonfinite=skip)")
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step)
        shown = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "tokens_per_s": timed.tokens_per_s,
            "step_s": timed.step_s,
        }
        shown |= {f"grad_norm/{m}": norm for m, norm in metrics.grad_norm_by_module.items()}
        for by in (metrics.loss_by_modality, metrics.loss_by_source):
            shown |= {f"loss/{name}": found.loss for name, found in by.items()} if len(by) > 1 else {}
        shown |= layer_values(metrics)
        self._plot(metrics.step, shown)

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: v for name, v in values.items() if math.isfinite(v)}
        self._on_boards(lambda board: board.plot(step, finite))

    def _on_boards(self, act: Callable[[Board], object]) -> None:
        """Do something on each board; one whose files cannot be written gets no more."""
        for board in [*self.boards]:
            try:
                act(board)
            except OSError as error:
                self.boards.remove(board)
                self.warn(f"{type(board).__name__} gets no more numbers: {error}")

    def _eta(self, step: int) -> float:
        done = max(1, step - self._first)
        return (time.monotonic() - self._began) / done * (self.steps - step)

    def went_back(self, step: int, last: int, why: str, batches: Sequence[str]) -> None:
        """Say that the run goes on after an earlier step, and drop the records of those behind it. batches:
        that it leaves out from now on."""
        if not self.lead:
            return
        self._metrics.close()
        self._skipped.close()
        self._metrics, self._skipped = self._open(METRICS, step), self._open(SKIPPED, step)
        record = {"step": step, "went_back": {"from": last, "why": why, "left_out": list(batches)}}
        self._metrics.write(json.dumps(record) + "\n")
        self._on_boards(lambda board: board.went_back(step))
        self.warn(
            f"after step {last} {why}; going on from the checkpoint of step {step} without the batches "
            f"{', '.join(batches)}"
        )
        self._began, self._first = time.monotonic(), step

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Show and write an evaluation."""
        if not self.lead:
            return
        record = {"step": step, "eval_loss": result.loss, "modality_lift": dict(result.lift)}
        self._metrics.write(json.dumps(record) + "\n")
        self._plot(step, {"eval_loss": result.loss, **{f"lift/{m}": v for m, v in result.lift.items()}})
        lifts = "  ".join(f"{m} lift {v:.3f}" for m, v in result.lift.items())
        self._say(f"evaluation after step {step}: loss {result.loss:.4f}  {lifts}")

    def lift_table(self, result: Evaluation, blind: Mapping[str, float]) -> None:
        """The closing table: what each modality is worth. blind: by module, the loss of a blind guess."""
        if not self.lead:
            return
        table = Table(title="held-out loss of the tokens that depend on a modality, nats a token")
        for heading in ("modality", "intact", "items permuted", "lift", *(["blind guess"] if blind else [])):
            table.add_column(heading, justify="left" if heading == "modality" else "right")
        for m, lift in result.lift.items():
            intact = result.intact[m]
            guess = [f"{blind[m]:.3f}" if m in blind else "-"] if blind else []
            table.add_row(m, f"{intact:.3f}", f"{intact + lift:.3f}", f"{lift:+.3f}", *guess)
        self._rich.print(table)
        text = io.StringIO()
        Rich(file=text, width=100).print(table)
        self._log.write(text.getvalue())

    def info(self, text: str) -> None:
        """A line from the lead rank."""
        if self.lead:
            self._say(text)

    def note(self, text: str) -> None:
        """A line for the log alone, of what was printed before the log was open."""
        if self.lead:
            self._log.write(text + "\n")

    def warn(self, text: str) -> None:
        """A line from whichever rank noticed."""
        self._warn(text)
        if self.lead:
            self._log.write(f"warning: {text}\n")

    def _warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return sum(file.lost for file in (self._metrics, self._skipped, self._log)) if self.lead else 0

    def left_out(self, index: Index, *, evaluation: bool = False) -> None:
        """Write which samples are left out from the start, as step 0; a resumed run has them already.

        evaluation: they are held-out ones.
        """
        if not self.lead or self._first:
            return
        more = {"evaluation": True} if evaluation else {}
        for shard, key, why in index.broken:
            self._write_skipped(0, key, shard, why, **more)
        for number, skip in index.skipped.items():
            sample = index.samples[number]
            self._write_skipped(0, sample.key, sample.shard, skip.why, **more)

    def skipped(self, step: int, skips: Sequence[Skip], *, evaluation: bool = False) -> None:
        """Write which samples a step has found to be unreadable, or an evaluation after it, which also
        says so and is listed once, also by a run that resumes."""
        listed = self._evaluated() if self.lead and evaluation else set[Any]()
        for skip in skips if self.lead else ():
            more: dict[str, str | bool] = {"portion": skip.portion} if skip.portion else {}
            if evaluation:
                self.warn(f"not evaluated: {skip}")
                more["evaluation"] = True
            if (skip.key, skip.shard, skip.portion) not in listed:
                self._write_skipped(step, skip.key, skip.shard, skip.why, **more)

    def _evaluated(self) -> set[Any]:
        """Key, shard and portion of the held-out samples that are listed."""
        records = map(json.loads, (self._run_dir / SKIPPED).read_text().splitlines())
        return {(r["key"], r["shard"], r.get("portion", "")) for r in records if r.get("evaluation")}

    def _write_skipped(self, step: int, key: str, shard: str, why: str, **more: str | bool) -> None:
        record = {"step": step, "key": key, "shard": shard, "why": why, **more}
        self._skipped.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        self._rich.print(text, markup=False)
        self._log.write(text + "\n")

    def close(self) -> None:
        """Finish the bar and the files."""
        if not self.lead:
            return
        if self._progress is not None:
            self._progress.stop()
        for board in self.boards:
            with contextlib.suppress(OSError):
                board.close()
        self._metrics.close()
        self._skipped.close()
        self._log.close()


def step_line(timed: TimedStep, steps: int, eta_s: float) -> str:
    """One line of progress."""
    metrics = timed.metrics
    norms = " ".join(f"{m} {v:.3g}" for m, v in metrics.grad_norm_by_module.items())
    boundary = sum(edge.seconds for edge in metrics.boundary.values())
    return (
        f"step {metrics.step:>{len(str(steps))}}/{steps}  loss {metrics.loss:.4f}  grad {norms}  "
        f"{timed.tokens_per_s:.0f} tok/s  {timed.tflops_per_device:.4f} TFLOPS/dev  "
        f"{metrics.peak_memory_bytes / 2**20:.0f} MiB  boundary {boundary * 1e3:.1f} ms  "
        f"data {metrics.data_s * 1e3:.1f} ms  ETA {eta_s:.0f} s"
    )


def layer_values(metrics: StepMetrics) -> dict[str, float]:
    """Each number of the layers' statistics by its name: gradient_norm/llm/layers.3."""
    return {
        f"{what}_{key}/{m}/{place}": value
        for m, places in metrics.layers.items()
        for place, layer in places.items()
        for what, found in (("gradient", layer.gradient), ("output", layer.output))
        for key, value in (asdict(found) if found is not None else {}).items()
    }
