"""The report of a single run, from its files alone: one that has ended, was stopped or is going on."""

from __future__ import annotations

import base64
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mm.pages.curves import MOST, STRETCHES, Curve, chart, grid
from mm.pages.frame import Section, document, write_page
from mm.pages.html import el, join, name
from mm.pages.rank_map import layout_table, rank_map
from mm.pages.run_files import LARGEST, RunFiles, Series, as_number, read_run
from mm.pages.tables import (
    Cell,
    Column,
    code,
    details,
    fact_table,
    facts,
    number,
    paragraphs,
    scroll,
    seconds,
    size,
    table,
)

REPORT = "report.html"
ROWS = 200  # skipped samples and damaged lines that are listed
TAIL = 60  # last lines of the log


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run's folder, into it where `out` is None; returns its file. Raises Refused."""
    path = folder / REPORT if out is None else out
    write_page(run_page(read_run(folder)), path)
    return path


def run_page(run: RunFiles) -> str:
    """The page of a run."""
    parts = [
        ("overview", "Overview", _overview(run)),
        ("learning", "Learning", _learning(run)),
        ("evaluation", "Evaluation", _evaluation(run)),
        ("time", "Time and memory", _time(run)),
        ("layout", "Layout and schedule", _layout(run)),
        ("data", "Data", _data(run)),
        ("command", "Command, host and versions", _starts(run)),
        ("config", "Config", code(run.config_text) if run.config_text else Markup()),
        ("log", "Log", _log(run)),
    ]
    found = [Section(*part) for part in parts if part[2]]
    return document(f"Run {run.folder.name or run.folder}", el("p", _state(run)), found)


def _state(run: RunFiles) -> Markup:
    train = run.config.get("train")
    wanted = train.get("steps") if isinstance(train, dict) else None
    of = f" of {wanted}" if isinstance(wanted, int) else ""
    return join([f"{number(run.last_step, 9)}{of} steps in ", name(run.folder), "."])


def _overview(run: RunFiles) -> Markup:
    loss, speed, step_s = run.of("loss"), run.of("tokens_per_s"), run.of("step_s")
    pairs: list[tuple[str, object]] = []
    if loss.values:
        pairs.append(("training loss", f"{number(loss.values[0])} to {number(loss.values[-1])}"))
    if held := run.of("eval_loss").values:
        pairs.append(("held-out loss", number(held[-1])))
    pairs += [(f"{m} lift", f"{s.values[-1]:+.4g} nats") for m, s in _some(run.under("modality_lift"))]
    pairs += [("tokens a second, median", number(_median(speed)))] if speed.values else []
    pairs += [("step, median", seconds(_median(step_s)))] if step_s.values else []
    pairs += [("tokens", number(math.fsum(run.of("tokens").values)))] if run.of("tokens").values else []
    if tflops := run.of("tflops_per_device").values:
        pairs.append(("TFLOPS a device, median", number(statistics.median(tflops))))
    if memory := run.of("peak_memory_bytes").values:
        pairs.append(("peak memory of a rank", size(max(memory))))
    pairs.append(("samples left out", len(run.skipped)))
    return join([facts(pairs), _damage(run), _warnings(run)])


def _damage(run: RunFiles) -> Markup:
    if not run.damaged:
        return Markup()
    shown = run.damaged[:ROWS]
    more = f" The first {len(shown)} are named." if len(shown) < len(run.damaged) else ""
    said = f"{len(run.damaged)} places of the run's files cannot be read and are left out of this page.{more}"
    listed = el("ul", *(el("li", str(d)) for d in shown))
    return el("div", el("p", el("b", "Damaged files. "), said), details("Which", listed), class_="warn")


def _warnings(run: RunFiles) -> Markup:
    found = [line for line in run.log.splitlines() if line.startswith("warning:")]
    if not found:
        return Markup()
    what = f"{len(found)} warning{'s' if len(found) > 1 else ''} in the log"
    return el("div", details(what, paragraphs(found[:ROWS])), class_="warn")


def _learning(run: RunFiles) -> Markup:
    charts = [
        _chart("loss", "Training loss", "nats a token", {"": run.of("loss")}),
        _chart("by-modality", "Loss by modality", "nats a token", run.under("loss_by_modality", "loss")),
        _chart("by-source", "Loss by source", "nats a token", run.under("loss_by_source", "loss")),
        _chart("objectives", "Other objectives", "unweighted", run.under("objectives")),
        _chart("norm", "Gradient norm before clipping", "", {"": run.of("grad_norm")}),
        _chart("norms", "Gradient norm by module", "", run.under("grad_norm_by_module")),
        _chart("lr", "Learning rate", "", {"": run.of("lr")}),
    ]
    if not any(charts):
        return el("p", "No step is written yet.")
    longest = max((len(s.steps) for s in run.series.values()), default=0)
    thinned = ""
    if longest > 2 * STRETCHES:
        thinned = (
            f" Of a curve with more than {2 * STRETCHES} steps, each of {STRETCHES} equal stretches is drawn "
            "by its lowest and its highest value, so that no spike is lost. Tables take every step."
        )
    keys = "Point at a chart, or focus it and press the arrow keys, for the values at a step."
    return join([el("p", keys, thinned, class_="soft"), grid(charts)])


def _evaluation(run: RunFiles) -> Markup:
    held, lifts = run.of("eval_loss"), dict(_some(run.under("modality_lift")))
    if not held.values:
        return Markup()
    charts = [
        _chart("eval-loss", "Held-out loss", "nats a token", {"": held}),
        _chart("lift", "Lift of each modality", "nats a token", lifts),
    ]
    by_step = {m: dict(zip(s.steps, s.values, strict=True)) for m, s in lifts.items()}
    columns = [Column("step"), Column("loss", True), *(Column(f"{m} lift", True) for m in by_step)]
    rows = [
        [
            Cell(number(step), step),
            Cell(number(loss, 5), loss),
            *(Cell(number(found.get(step)), found.get(step)) for found in by_step.values()),
        ]
        for step, loss in zip(held.steps, held.values, strict=True)
    ]
    about = (
        "The lift of a modality is the loss of the tokens that depend on it when its items are exchanged "
        "between samples, minus their loss when they are intact: what seeing or hearing is worth."
    )
    return join([el("p", about), grid(charts), table("Evaluations", columns, rows)])


def _time(run: RunFiles) -> Markup:
    step_s = run.of("step_s")
    if not step_s.values:
        return Markup()
    parts = {f"forwards and backwards of {m}": s for m, s in run.under("seconds_by_module").items()}
    parts |= {"gradients' sums and update": run.of("optimizer_s"), "wait for data": run.of("data_s")}
    parts |= {f"boundary of {m}": s for m, s in run.under("boundary", "seconds").items()}
    charts = [
        _chart("speed", "Tokens a second", "", {"": run.of("tokens_per_s")}),
        _chart("step-s", "Seconds a step", "s", {"": step_s}),
        _chart("parts", "Parts of a step", "s", parts),
        _chart("tflops", "TFLOPS a device", "", {"": run.of("tflops_per_device")}),
        _chart("memory", "Peak memory of a rank", "MiB", {"": run.of("peak_memory_bytes")}, scale=2**-20),
        _chart("bytes", "Boundary payload", "MiB a step", run.under("boundary", "bytes"), scale=2**-20),
        _chart("imbalance", "Imbalance of dealt work", "largest / mean", run.under("imbalance", "dealt")),
    ]
    whole = _median(step_s) or 0.0
    columns = [Column("part"), *(Column(c, True) for c in ("median", "longest", "share of a median step"))]
    rows: list[list[object]] = []
    for part, s in {"whole step": step_s, **parts}.items():
        middle = _median(s)
        if middle is not None:
            share = f"{100 * middle / whole:.0f} %" if whole else "-"
            rows.append(
                [
                    part,
                    Cell(seconds(middle), middle),
                    Cell(seconds(max(s.values)), max(s.values)),
                    Cell(share, middle),
                ]
            )
    note = "Parts are host seconds of the slowest rank each; they overlap, so they do not add up to it."
    return join([grid(charts), el("p", note, class_="soft"), table("Parts of a step", columns, rows)])


def _layout(run: RunFiles) -> Markup:
    plan = run.plan
    layouts = {str(m): x for m, x in _dict(plan.get("layouts")).items() if isinstance(x, dict)}
    out: list[Markup] = []
    if layouts:
        out += [grid([rank_map("ranks", layouts)]), layout_table(layouts)]
    edges = {str(m): e for m, e in _dict(plan.get("edges")).items() if isinstance(e, dict)}
    if edges:
        columns = [Column("edge from"), *(Column(c, True) for c in ("rows", "forward", "backward"))]
        rows = [
            [
                m,
                e.get("rows", "-"),
                *(size(as_number(e.get(f"{way}_bytes"))) for way in ("forward", "backward")),
            ]
            for m, e in edges.items()
        ]
        out.append(table("Payload of the boundaries in the first step, over all ranks", columns, rows))
    kind = _dict(plan.get("schedule")).get("kind")
    out += [el("p", "Schedule: ", name(kind), ".")] if kind is not None else []
    out += [_picture(path) for path in run.pictures[:8]]
    return join(out)


def _picture(path: Path) -> Markup:
    """A drawing that the run wrote, as a picture: scripts in it, if any, do not run."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        return el("p", f"{path.name} cannot be read: {error.strerror}", class_="warn")
    if len(payload) > LARGEST:
        return el("p", f"{path.name} is too large for this page: {size(len(payload))}")
    step = path.stem.removeprefix("schedule").strip("-")
    what = f"Step {step} as it ran" if step else "A step as simulated from its FLOPs"
    alt = f"{what}: a row a rank, time from left to right; the same is in {path.name}"
    source = f"data:image/svg+xml;base64,{base64.b64encode(payload).decode()}"
    return el("figure", el("figcaption", el("b", what)), scroll(what, el("img", src=source, alt=alt)))


def _data(run: RunFiles) -> Markup:
    out = []
    drawn = {str(k): v for k, v in _dict(run.last.get("drawn_by_source")).items() if isinstance(v, dict)}
    counts = {k: {w: as_number(v.get(w)) or 0.0 for w in ("samples", "tokens")} for k, v in drawn.items()}
    if counts:
        total = {w: math.fsum(c[w] for c in counts.values()) or 1.0 for w in ("samples", "tokens")}
        columns = [
            Column("source"),
            *(Column(c, True) for c in ("samples", "of all", "tokens", "of all tokens")),
        ]
        rows = []
        for source, c in counts.items():
            row: list[object] = [source]
            for w in ("samples", "tokens"):
                row += [Cell(number(c[w], 9), c[w]), Cell(f"{100 * c[w] / total[w]:.2f} %", c[w])]
            rows.append(row)
        out.append(table("Drawn from each source so far", columns, rows))
    out.append(_skipped(run.skipped))
    return join(out)


def _skipped(skipped: list[dict[str, Any]]) -> Markup:
    if not skipped:
        return el("p", "No sample was left out.")
    when = Counter(_when(s) for s in skipped)
    said = ", ".join(f"{n} {text}" for text, n in when.items())
    more = f"; the first {ROWS} are listed, skipped.jsonl has all" if len(skipped) > ROWS else ""
    columns = [Column("sample"), Column("step", True), Column("shard", long=True), Column("why", long=True)]
    rows = [
        [
            s.get("key", "-"),
            Cell(s.get("step", "-"), as_number(s.get("step"))),
            s.get("shard", "-"),
            s.get("why", "-"),
        ]
        for s in skipped[:ROWS]
    ]
    about = el("p", f"{len(skipped)} samples were left out: {said}{more}.")
    return join(
        [about, details("Samples that were left out", table("Samples that were left out", columns, rows))]
    )


def _when(skip: dict[str, Any]) -> str:
    held = " (held out)" if skip.get("evaluation") is True else ""
    return ("before the first step" if skip.get("step") == 0 else "while training") + held


def _starts(run: RunFiles) -> Markup:
    if not run.starts:
        return el("p", "The run has no starts.jsonl: it was started by a Polyrank that did not write it.")
    last, out = run.starts[-1], []
    if command := last.get("command"):
        out += [
            el("p", "The command, from the folder ", name(last.get("folder", "-")), ":"),
            code(str(command), wrap=True),
        ]
    host = {k: v for k, v in last.items() if k not in ("command", "folder", "step")}
    out.append(fact_table("Ranks, host and versions of the last start", host))
    if len(run.starts) > 1:
        heads = [("date", False), ("step", True), ("ranks", True), ("host", False)]
        columns = [*(Column(*h) for h in heads), Column("command", long=True)]
        rows = [[s.get(c.heading, "-") for c in columns] for s in run.starts]
        out.append(table("All starts", columns, rows))
    return join(out)


def _log(run: RunFiles) -> Markup:
    lines = run.log.splitlines()
    if not lines:
        return Markup()
    about = f"The last {min(TAIL, len(lines))} of {len(lines)} lines of log.txt."
    return join([el("p", about, class_="soft"), code("\n".join(lines[-TAIL:]))])


def _chart(id: str, title: str, unit: str, found: Mapping[str, Series], *, scale: float = 1.0) -> Markup:
    """A chart of series by name; of more than fit, those with most steps."""
    most = sorted(found, key=lambda k: -len(found[k].steps))
    kept = [k for k in found if k in set(most[:MOST])]
    dropped = [k for k in found if k not in kept]
    curves = [_curve(k, found[k], scale) for k in [*kept, *dropped]]
    return chart(f"chart-{id}", title, unit, curves)


def _curve(name: str, s: Series, scale: float) -> Curve:
    order = range(len(s.steps))
    if any(b < a for a, b in zip(s.steps, s.steps[1:], strict=False)):
        order = sorted(order, key=s.steps.__getitem__)  # type: ignore[assignment]
    return Curve(name, [s.steps[i] for i in order], [s.values[i] * scale for i in order])


def _some(found: Mapping[str, Series]) -> list[tuple[str, Series]]:
    return [(m, s) for m, s in found.items() if s.values]


def _median(s: Series) -> float | None:
    return statistics.median(s.values) if s.values else None


def _dict(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
