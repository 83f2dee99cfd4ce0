"""A comparison for people, as a table in a terminal or in a file."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mm.compare.result import Comparison, RunResult

WIDE = 200  # columns of a table that goes to a file


def show(result: Comparison) -> None:
    """Print the table, and the verdict under it."""
    console = Console(highlight=False)
    if not console.is_terminal:  # in a file each layout gets one line
        console.width = WIDE
    console.print(table(result.runs))
    if result.verdict is not None:
        for sentence in result.verdict.sentences:
            console.print(sentence, markup=False, soft_wrap=True)
        for one in result.verdict.next_steps:
            console.print(f"Try next: {one}", markup=False, soft_wrap=True)


def table(summaries: Sequence[RunResult]) -> Table:
    """The comparison for people."""
    out = Table(title="same model, data, seed and batches; first row is the baseline", box=SIMPLE_HEAD)
    headings = (
        "step ms (min)",
        "tokens/s",
        "GFLOP/s a rank",
        "memory MiB",
        "boundary KiB/step",
        "loss diff",
        "grad norm diff",
    )
    # Names are folded, never shortened: names of layouts often differ only at their ends.
    out.add_column("layout", overflow="fold")
    for heading in (*headings, "speed-up", "95 % interval"):
        out.add_column(heading, justify="right", overflow="fold")
    for run in summaries:
        cells = (
            run.name,
            f"{run.step_s.median * 1e3:.1f} ({run.step_s.min * 1e3:.1f})",
            f"{run.tokens_per_s:.0f}",
            f"{run.tflops_per_device * 1e3:.1f}{'' if run.mfu is None else f' ({run.mfu:.1%})'}",
            f"{sum(run.memory_by_kind.values()) / 2**20:.0f}" if run.memory_by_kind else "-",
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
