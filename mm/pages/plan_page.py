"""The report of a plan: the best few layouts as predicted, what each second goes to, what was left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mm.pages.bars import Scale, bars
from mm.pages.curves import grid
from mm.pages.frame import Section, document
from mm.pages.frontier import Point, frontier
from mm.pages.html import el, join, name
from mm.pages.rank_map import layout_table, rank_map
from mm.pages.tables import Cell, Column, code, details, number, paragraphs, seconds, size, size_unit, table
from mm.pages.timeline import drawn
from mm.predict.step import Prediction
from mm.search.candidate import Candidate
from mm.search.plan import Plan
from mm.search.predictor import Judged
from mm.search.rejected import Rejected
from parallel.schedule.drawing.chart import simulated

DRAWN = 6  # timelines


@dataclass(frozen=True)
class Planned:
    """A layout of a plan. goals: what it is the best of, such as "homogeneous". file: the layout file."""

    name: str
    goals: str
    prediction: Prediction
    file: str

    @property
    def layouts(self) -> dict[str, dict[str, Any]]:
        """By module, its ranks and degrees."""
        modules = self.prediction.timeline.plan.modules
        found = {m: modules[m].layout for m in modules}
        return {m: {**x.degrees, "dp": x.dp, "edp": x.edp, "ranks": list(x.ranks)} for m, x in found.items()}


@dataclass(frozen=True)
class PlanReport:
    """sentences: what was found, in plain words. hardware: its name. command: of the plan."""

    found: Sequence[Planned]
    rejected: Sequence[Rejected]
    sentences: Sequence[str]
    hardware: str
    world: int
    command: str
    config_file: str


def found_by(plan: Plan, files: Callable[[Judged], str]) -> list[Planned]:
    """The layouts that a search found, each once, with all that it is best of. files: of each, its file."""
    goals: dict[Candidate, list[str]] = {}
    judged: dict[Candidate, Judged] = {}
    numbered = [(f"best {k}", one) for k, one in enumerate(plan.best, 1)]
    named = [(goal, one) for goal, one in plan.of.items() if goal != "best" and one is not None]
    for goal, one in [*numbered, *named]:
        goals.setdefault(one.candidate, []).append(goal)
        judged.setdefault(one.candidate, one)
    out = []
    for candidate, one in judged.items():
        assert one.prediction is not None
        out.append(Planned(goals[candidate][0], ", ".join(goals[candidate]), one.prediction, files(one)))
    return out


def plan_page(plan: PlanReport) -> str:
    """The page of a plan."""
    parts = [
        ("found", "What was found", join([_figures(plan.found), paragraphs(plan.sentences)])),
        ("frontier", "Time against memory", _frontier(plan.found)),
        ("ranks", "Where each module is", _ranks(plan.found)),
        ("seconds", "What each second goes to", _seconds(plan.found)),
        ("memory", "Memory", _memory(plan.found)),
        ("timelines", "Timelines", _timelines(plan.found)),
        ("rejected", "Left out, and why", _rejected(plan.rejected)),
        ("commands", "Command and layout files", _files(plan)),
    ]
    sections = [Section(*part) for part in parts if part[2]]
    where = f" on {plan.world} devices of "
    intro = el("p", "Predicted, not measured: ", name(plan.config_file), where, name(plan.hardware), ".")
    return document(f"Plan for {plan.world} devices", intro, sections)


def _figures(found: Sequence[Planned]) -> Markup:
    columns = [Column("layout"), Column("best of"), Column("schedule")]
    heads = (
        "step",
        "tokens/s a device",
        "TFLOPS a device",
        "as in the paper",
        "memory",
        "bubble",
        "boundary",
    )
    columns += [Column(c, True) for c in heads]
    rows = []
    for one in found:
        p = one.prediction
        rows.append(
            [
                *(one.name, one.goals, p.timeline.plan.kind),
                Cell(seconds(p.step_s), p.step_s),
                *(
                    Cell(number(v), v)
                    for v in (p.tokens_per_s_per_device, p.tflops_per_device, p.paper_tflops_per_device)
                ),
                Cell(size(p.peak_memory_bytes), p.peak_memory_bytes),
                Cell(f"{100 * p.bubble_fraction:.1f} %", p.bubble_fraction),
                Cell(seconds(p.boundary_s), p.boundary_s),
            ]
        )
    return table("Layouts as predicted", columns, rows)


def _frontier(found: Sequence[Planned]) -> Markup:
    points = [Point(f.name, f.prediction.step_s, f.prediction.peak_memory_bytes) for f in found]
    return frontier("frontier-picture", "Step against memory", points)


def _ranks(found: Sequence[Planned]) -> Markup:
    maps = [rank_map(f"map-{k}", one.layouts, one.name) for k, one in enumerate(found)]
    tables = [layout_table(one.layouts, f"Layout of {one.name}") for one in found]
    return join([grid(maps), details("Degrees and ranks", join(tables))]) if found else Markup()


def _seconds(found: Sequence[Planned]) -> Markup:
    """Of the mean rank, by what is done; the modules of each are in the tables."""
    rows: dict[str, dict[str, float]] = {}
    columns = [Column("module"), Column("what"), Column("seconds", True), Column("share", True)]
    tables = []
    for one in found:
        by_what: dict[str, float] = defaultdict(float)
        for (_, what), s in one.prediction.breakdown.items():
            by_what[what] += s
        rows[one.name] = by_what
        whole = one.prediction.step_s
        cells = [
            [module or "-", what, Cell(seconds(s), s), Cell(f"{100 * s / whole:.1f} %", s)]
            for (module, what), s in sorted(one.prediction.breakdown.items(), key=lambda item: -item[1])
        ]
        tables.append(table(f"Seconds of the mean rank in {one.name}", columns, cells))
    # Parts are in one order in all bars: the longest of all layouts together first.
    whats = {what for row in rows.values() for what in row}
    order = sorted(whats, key=lambda what: (-sum(row.get(what, 0.0) for row in rows.values()), what))
    rows = {one: {what: row.get(what, 0.0) for what in order} for one, row in rows.items()}
    picture = bars("breakdown", "Seconds of the mean rank", rows, seconds, Scale("layout"))
    return join([grid([picture]), details("By module", join(tables))]) if picture else Markup()


def _memory(found: Sequence[Planned]) -> Markup:
    rows = [(one, _by_rank(one.prediction)) for one in found]
    most = max((sum(row.values()) for _, ranks in rows for row in ranks.values()), default=0.0)
    parts = list(dict.fromkeys(kind for _, ranks in rows for row in ranks.values() for kind in row))
    scale = Scale("rank", most, parts, size_unit(most)[1])
    about = "One rank of each kind, by what it holds at its peak, all layouts on one scale."
    shown = [bars(f"memory-{k}", one.name, ranks, size, scale) for k, (one, ranks) in enumerate(rows)]
    return join([el("p", about, class_="soft"), grid(shown)]) if any(shown) else Markup()


def _by_rank(prediction: Prediction) -> dict[str, dict[str, float]]:
    return {f"rank {rank}": dict(kinds) for rank, kinds in prediction.memory.items()}


def _timelines(found: Sequence[Planned]) -> Markup:
    charts = [(one, simulated(one.prediction.timeline)) for one in found[:DRAWN]]
    longest = max((chart.seconds for _, chart in charts), default=0.0)
    about = "Forward and backward of a step as predicted, a row a kind of rank, all on one scale of time."
    shown = [drawn(f"timeline-{k}", one.name, chart, longest) for k, (one, chart) in enumerate(charts)]
    return join([el("p", about, class_="soft"), *shown]) if shown else Markup()


def _rejected(rejected: Sequence[Rejected]) -> Markup:
    if not rejected:
        return Markup()
    columns = [Column("layouts", long=True), Column("how many", True), Column("why", long=True)]
    rows = [[r.layout, Cell(number(r.count, 9), r.count), r.why] for r in rejected]
    return table("Layouts that were left out", columns, rows)


def _files(plan: PlanReport) -> Markup:
    out = [code(plan.command, wrap=True)] if plan.command else []
    out += [details(f"{one.name}: its layout file", code(one.file)) for one in plan.found if one.file]
    return join(out)
