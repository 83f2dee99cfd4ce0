"""The report of a comparison: which layout is fastest, why, and everything that was measured of each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from mm.compare.result import MEMORY_KINDS, Comparison, Placed, RankResult, RunResult
from mm.pages.bars import Scale, bars
from mm.pages.curves import Curve, chart, grid
from mm.pages.frame import Section, document
from mm.pages.html import el, join, name
from mm.pages.rank_map import layout_table, rank_map
from mm.pages.tables import (
    Cell,
    Column,
    code,
    details,
    fact_table,
    number,
    paragraphs,
    seconds,
    size,
    size_unit,
    table,
)
from mm.pages.timeline import drawn, measured_chart

MOST_RANKS = 64  # that have a bar of their own

ByRank = dict[str, dict[str, float]]  # of each rank, its parts


def compare_page(found: Comparison) -> str:
    """The page of a comparison."""
    parts = [
        ("verdict", "Verdict", _verdict(found)),
        ("figures", "Figures", _figures(found)),
        ("ranks", "Where each module is", _ranks(found.runs)),
        ("timelines", "Timelines", _timelines(found.runs)),
        ("time", "Where the time of each rank goes", _time(found.runs)),
        ("memory", "Memory", _memory(found.runs)),
        ("work", "Work, balance and boundaries", _work(found.runs)),
        ("learning", "Learning", _learning(found.runs)),
        ("commands", "Commands and configs", _commands(found)),
        ("host", "Host and versions", fact_table("Facts", found.host) if found.host else Markup()),
    ]
    sections = [Section(*part) for part in parts if part[2]]
    count = f"{len(found.runs)} layouts of "
    how = f" on {found.world} ranks: {found.rounds} rounds of {found.steps} steps each, the first to warm up."
    intro = el("p", count, name(found.config_file or "a job"), how)
    return document(f"Comparison of {len(found.runs)} layouts", intro, sections)


def _verdict(found: Comparison) -> Markup:
    if found.verdict is None:
        return Markup()
    steps = paragraphs(found.verdict.sentences)
    if not found.verdict.next_steps:
        return steps
    listed = el("ul", *(el("li", line) for line in found.verdict.next_steps))
    return join([steps, el("h3", "What to try next"), listed])


def _figures(found: Comparison) -> Markup:
    numbers = ("step median", "least", "most", "tokens/s", "speed-up", "95 % interval")
    columns = [Column("layout"), *(Column(c, True) for c in numbers), Column("against the first")]
    rest = (
        "TFLOPS a device",
        "MFU",
        "memory of a rank",
        "boundary a step",
        "loss differs by",
        "norms differ by",
    )
    columns += [Column(c, True) for c in rest]
    rows = [_figures_of(run) for run in found.runs]
    about = (
        "The first layout is the baseline. Speed-ups are of medians; intervals that hold 1 are noise. "
        "Differences are the largest relative ones of losses and norms in the first round."
    )
    times = {run.name: {"median step": run.step_s.median} for run in found.runs}
    return join(
        [
            table("Figures of each layout", columns, rows),
            el("p", about, class_="soft"),
            grid([bars("step", "Median step of each layout", times, seconds, Scale("layout"))]),
        ]
    )


def _figures_of(run: RunResult) -> list[object]:
    low_high = run.speedup_interval
    interval = "-" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
    mfu = "-" if run.mfu is None else f"{100 * run.mfu:.1f} %"
    return [
        run.name,
        *(Cell(seconds(s), s) for s in (run.step_s.median, run.step_s.min, run.step_s.max)),
        Cell(number(run.tokens_per_s), run.tokens_per_s),
        Cell(f"{run.speedup:.3f}x", run.speedup),
        Cell(interval, None if low_high is None else low_high[0]),
        run.speedup_verdict,
        Cell(number(run.tflops_per_device), run.tflops_per_device),
        Cell(mfu, run.mfu),
        Cell(size(run.peak_memory_bytes), run.peak_memory_bytes),
        Cell(size(run.boundary_bytes_per_step), run.boundary_bytes_per_step),
        *(Cell(f"{d:.1e}", d) for d in (run.max_rel_loss_diff, run.max_rel_grad_norm_diff)),
    ]


def _ranks(runs: Sequence[RunResult]) -> Markup:
    placed = [(k, run) for k, run in enumerate(runs) if run.placed]
    if not placed:
        return Markup()
    maps = [rank_map(f"ranks-{k}", _layouts(run.placed), run.name) for k, run in placed]
    tables = [layout_table(_layouts(run.placed), f"Layout of {run.name}") for _, run in placed]
    return join([grid(maps), details("Degrees and ranks", join(tables))])


def _layouts(placed: Mapping[str, Placed]) -> dict[str, dict[str, object]]:
    return {m: {**p.degrees, "ranks": p.ranks} for m, p in placed.items()}


def _timelines(runs: Sequence[RunResult]) -> Markup:
    lines = [(k, run, run.timeline) for k, run in enumerate(runs) if run.timeline is not None]
    if not lines:
        return Markup()
    longest = max(line.seconds for _, _, line in lines)
    about = (
        "Forward and backward of one step of each layout as it ran, all on one scale of time. Numbers are "
        "micro-batches; the update follows. Boxes scroll sideways."
    )
    shown = [
        drawn(
            f"timeline-{k}",
            f"{run.name}: step {line.step}",
            measured_chart(line, {r.rank: r for r in run.ranks}),
            longest,
        )
        for k, run, line in lines
    ]
    return join([el("p", about, class_="soft"), *shown])


def _time(runs: Sequence[RunResult]) -> Markup:
    rows = {run.name: _by_rank(run.ranks, _parts) for run in runs if run.ranks}
    longest = _longest(rows)
    modules = list(dict.fromkeys(m for run in runs for m in run.placed))
    order = [*modules[-1:], *modules[:-1]]  # the sink has the first colour, as in the timelines
    shown = [
        bars(f"time-{k}", label, found, seconds, Scale("rank", longest, order))
        for k, (label, found) in enumerate(rows.items())
    ]
    tables = [_actions(run) for run in runs if run.ranks]
    return (
        join([grid(shown), details("Every kind of action on every rank", join(tables))])
        if shown
        else Markup()
    )


def _parts(rank: RankResult) -> dict[str, float]:
    """Seconds of a rank's step: in each module's actions, waiting there, the update, data."""
    out: dict[str, float] = defaultdict(float)
    for action in rank.actions:
        out[action.module] += max(0.0, action.seconds - action.waited)
    out["waits for inputs"] = sum(action.waited for action in rank.actions)
    out["update"], out["data"] = rank.update_s, rank.data_s
    return dict(out)


def _actions(run: RunResult) -> Markup:
    columns = [Column("rank"), Column("module"), Column("action")]
    columns += [Column(c, True) for c in ("seconds", "waited", "processor", "queued")]
    rows = [
        [Cell(f"rank {rank.rank}", rank.rank), a.module, a.kind.replace("_", " ")]
        + [Cell(seconds(s), s) for s in (a.seconds, a.waited, a.processor, a.queued)]
        for rank in run.ranks[:MOST_RANKS]
        for a in rank.actions
    ]
    return table(f"Actions of {run.name} in one step", columns, rows)


def _memory(runs: Sequence[RunResult]) -> Markup:
    rows = {run.name: _by_rank(run.ranks, _kinds) for run in runs if run.ranks}
    longest = _longest(rows)
    _, unit = size_unit(longest)
    shown = [
        bars(f"memory-{k}", label, found, size, Scale("rank", longest, MEMORY_KINDS, unit))
        for k, (label, found) in enumerate(rows.items())
    ]
    about = "Tensors of each rank at its peak, all layouts on one scale."
    return join([el("p", about, class_="soft"), grid(shown)]) if any(shown) else Markup()


def _kinds(rank: RankResult) -> dict[str, float]:
    return {kind: float(rank.memory.get(kind, 0)) for kind in MEMORY_KINDS}


def _by_rank(ranks: Sequence[RankResult], of: Callable[[RankResult], dict[str, float]]) -> ByRank:
    return {f"rank {rank.rank}": of(rank) for rank in ranks[:MOST_RANKS]}


def _longest(rows: Mapping[str, ByRank]) -> float:
    return max((sum(row.values()) for found in rows.values() for row in found.values()), default=0.0)


def _work(runs: Sequence[RunResult]) -> Markup:
    columns = [Column("layout"), Column("module")]
    heads = ("FLOPs a step", "TFLOPS a device", "TFLOPS while busy", "imbalance", "boundary", "waits there")
    columns += [Column(c, True) for c in heads]
    rows = []
    for run in runs:
        for m in run.flops_by_module:
            edge = run.boundary.get(m)
            figures = (
                run.flops_by_module[m],
                run.tflops_per_device_by_module.get(m),
                run.tflops_while_busy.get(m),
                run.imbalance.get(m),
            )
            cells = [Cell(number(v), v) for v in figures]
            moved = Cell("-") if edge is None else Cell(size(edge.bytes), edge.bytes)
            waits = Cell("-") if edge is None else Cell(seconds(edge.seconds), edge.seconds)
            rows.append([run.name, m, *cells, moved, waits])
    if not rows:
        return Markup()
    about = "Imbalance is the costliest data rank over the mean, by FLOPs. FLOPs hold no recomputation."
    return join([table("Work of each module", columns, rows), el("p", about, class_="soft")])


def _learning(runs: Sequence[RunResult]) -> Markup:
    curves = [_steps(run.name, run.losses) for run in runs]
    modules = dict.fromkeys(m for run in runs for norms in run.grad_norms_by_module for m in norms)
    charts = [chart("loss", "Loss", "nats a token", curves)]
    for m in modules:
        norms = [_steps(run.name, [n.get(m, math.nan) for n in run.grad_norms_by_module]) for run in runs]
        charts.append(chart(f"norm-{len(charts)}", f"Gradient norm of {m}", "", norms))
    about = "Steps of the first round. Layouts learn the same: their curves lie on each other."
    return join([el("p", about, class_="soft"), grid(charts)])


def _steps(name: str, values: Sequence[float]) -> Curve:
    return Curve(name, range(1, len(values) + 1), values)


def _commands(found: Comparison) -> Markup:
    out = [el("p", "This comparison:"), code(found.command, wrap=True)] if found.command else []
    for run in found.runs:
        body = [code(run.command, wrap=True)] if run.command else []
        body += [code(run.config)] if run.config else []
        if body:
            title = (
                f"{run.name}{f' ({run.file})' if run.file else ''}: its training command and resolved config"
            )
            out.append(details(title, join(body)))
    return join(out)
