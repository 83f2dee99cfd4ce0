"""`plan CONFIG --devices N --hardware NAME`: which layout to run, predicted; or what one layout takes."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import MOST_RANKS, OVERRIDES, Command, check_writable, one_config_of, stage_option
from mm.errors import Refused

if TYPE_CHECKING:
    from mm.config.schema import Config
    from mm.pages.plan_page import Planned
    from mm.predict.hardware import Hardware
    from mm.predict.step import Prediction
    from mm.search.candidate import Candidate
    from mm.search.predictor import Judged
    from mm.search.rejected import Rejected
    from mm.search.space import Space


DRAWN = 4  # steps of ragged data of which --layout says mean and deviation
WIDTH = 120  # columns that the table needs, also where the output is a file


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="devices, one a rank (default run.nproc)")
    add("--hardware", default="h100", metavar="NAME|FILE", help="of configs/hardware (default h100)")
    stage_option(parser)
    add("--layout", type=Path, metavar="FILE", help="predict this layout file in the place of a search")
    add("--top", type=int, default=3, metavar="K", help="how many of the best (default 3)")
    add("--seconds", type=float, default=50.0, help="processor seconds that the search may take (default 50)")
    add(
        "--within",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="end as soon as nothing left out can be faster by more than this, 0.05 being 5 %% (default 0)",
    )
    add("--json", type=Path, metavar="OUT", help="write the result here")
    add("--out", type=Path, metavar="FILE", help="write the best as a layout file, for compare and train")
    add("--report", type=Path, metavar="OUT", help="write a page here: one HTML file (docs/reports.md)")
    add("--explain", action="store_true", help="what each second goes to, and what would help most")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    from mm.predict.hardware import load_hardware

    # Without torch, whose import takes seconds: a mistyped name need not wait for it.
    hardware = load_hardware(args.hardware)
    cfg = one_config_of(args)
    world = args.devices if args.devices is not None else cfg.run.nproc
    if not 1 <= world <= MOST_RANKS:
        raise Refused(f"--devices {world}; needed: 1 to {MOST_RANKS}")
    _check_options(args)
    if args.layout is None:
        _check_searched(cfg)
    from mm.search.predictor import on_nodes

    cfg = on_nodes(cfg, world, hardware)
    if args.layout is not None:
        _one(args, argv, cfg, (world, hardware))
    else:
        _search(args, argv, cfg, (world, hardware))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse before any work what would be refused, or would have no effect, after it."""
    if args.top < 1 or not args.seconds > 0:
        raise Refused(f"--top {args.top} --seconds {args.seconds}; needed: at least 1, and more than 0")
    if not 0 <= args.within < math.inf:
        raise Refused(f"--within {args.within:g}; needed: a share, such as 0.05 for 5 %, or 0")
    if args.layout is not None:
        for option, given in (("--out", args.out is not None), ("--within", args.within > 0)):
            if given:
                raise Refused(f"{option} with --layout {args.layout}: {option} is of a search; leave one out")
    check_writable(json=args.json, out=args.out, report=args.report)


def _check_searched(cfg: Config) -> None:
    if cfg.run.engine != "polyrank" or isinstance(cfg.train.recompute, dict):
        raise Refused(
            f"run.engine={cfg.run.engine} and train.recompute={cfg.train.recompute}: a search is of this "
            "program, and tries what all modules recompute alike; needed: run.engine=polyrank and "
            "train.recompute=true or false, or one layout, --layout FILE"
        )


def _search(args: argparse.Namespace, argv: list[str], cfg: Config, on: tuple[int, Hardware]) -> None:
    from rich.console import Console

    from mm.predict.count.left_out import left_out
    from mm.search.plan import Planner
    from mm.search.predictor import Predictor
    from mm.search.written import as_json, layout_file, sentences, summary, table

    world, hardware = on
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    with console.status(f"{world} {hardware.name}: bounding candidates") as status:

        def tell(goal: str, predicted: int, best: float) -> None:
            status.update(f"{world} {hardware.name}, {goal}: {predicted} predicted, best {best:.4g} s")

        planner = Planner(
            cfg,
            world,
            hardware,
            top=args.top,
            limit=args.seconds,
            tell=tell,
            within=args.within,
            finish=args.explain,
        )
        plan = planner.plan()
    best, command = plan.best[0], shlex.join(["python", "-m", "mm", *argv])
    lacking = left_out(Predictor(cfg, world, hardware).blueprint(best.candidate.config(cfg)))
    text = layout_file(best, cfg, command)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(plan, cfg) | {"not_counted": lacking}))
    if args.out is not None:
        args.out.write_text(text)
    console.print(table(plan))
    for line in summary(plan):
        console.print(line, markup=False)
    console.print("left out:")
    for rejected in plan.rejected[:12]:
        console.print(f"  {rejected.count:,} of {rejected.layout}: {rejected.why}", markup=False)
    for sentence in lacking:
        console.print(f"not counted as it runs: {sentence}", markup=False)
    console.print(f"the best as a layout file{f', in {args.out}' if args.out else ''}:\n{text}", markup=False)
    if args.report is not None:
        from mm.pages.plan_page import found_by

        found = found_by(plan, lambda one: layout_file(one, cfg, command))
        _report(args, argv, on, found, plan.rejected, [*sentences(plan), *_not_counted(lacking)])
    if args.explain:
        _explain(cfg, on, best, plan.space, plan.known)


def _not_counted(sentences: Sequence[str]) -> list[str]:
    """What counts leave out, for a page."""
    return [f"Not counted as it runs: {sentence}." for sentence in sentences]


def _one(args: argparse.Namespace, argv: list[str], cfg: Config, on: tuple[int, Hardware]) -> None:
    """What one layout takes."""
    world, hardware = on
    from mm.config.schema import load_layout_file, with_layout
    from mm.predict.count.left_out import left_out
    from mm.predict.step import shortfall
    from mm.search.fits import fitting_lines, would_fit
    from mm.search.predictor import Predictor
    from mm.search.written import entry

    layout, schedule = load_layout_file(args.layout)
    try:
        made = with_layout(cfg, layout, schedule)
        predictor = Predictor(made, world, hardware)
        blueprint = predictor.blueprint(made)
        found = predictor.of_config(made)
    except Refused as error:
        raise Refused(f"{args.layout}: {error}") from error
    lacking, drawn, why = left_out(blueprint), predictor.drawn(made, DRAWN), shortfall(found, hardware)
    jitter = {} if drawn is None else {"mean_step_s": drawn.mean_s, "jitter_s": drawn.jitter_s}
    rejected = [] if why is None else [{"layout": str(args.layout), "why": why}]
    result = {"candidates": [entry(None, found, made) | jitter], "rejected": rejected, "not_counted": lacking}
    lines = [f"{found.step_s:.4g} s a step, {found.tokens_per_s_per_device:.4g} tokens/s a device,"]
    lines.append(f"{found.tflops_per_device:.4g} TFLOPS a device, idle {found.bubble_fraction:.1%},")
    if found.paper_tflops_per_device is not None and cfg.run.engine == "megatron":
        lines.append(f"{found.paper_tflops_per_device:.4g} by the published metric,")
    lines.append(f"{found.peak_memory_bytes / 1e9:.3g} GB on rank {found.fullest}")
    lines += [f"not counted as it runs: {sentence}" for sentence in lacking]
    if drawn is not None:
        lines.append(
            f"{DRAWN} drawn steps: {drawn.mean_s:.4g} s in the mean, {drawn.jitter_s:.2g} s deviation"
        )
    lines += [] if why is None else [f"it does not fit: {why}"]
    _print(f"{args.layout} on {world} {hardware.name}, {predictor.note}:", lines)
    fitting = [] if why is None else would_fit(made, world, hardware)
    if args.json is not None:
        args.json.write_text(json.dumps(result | {"would_fit": [f._asdict() for f in fitting]}))
    for line in [] if why is None else fitting_lines(fitting):
        print(f"  {line}")
    if args.report is not None:
        from mm.pages.plan_page import Planned

        one = Planned(args.layout.stem, "", found, args.layout.read_text(encoding="utf-8"))
        said = [f"Samples: {predictor.note}."]
        said += [] if why is None else [f"It does not fit: {why}.", *fitting_lines(fitting)]
        _report(args, argv, on, [one], [], [*said, *_not_counted(lacking)])
    if args.explain:
        _explain_one(made, on, found, dict(blueprint.policies))


def _report(
    args: argparse.Namespace,
    argv: list[str],
    on: tuple[int, Hardware],
    found: Sequence[Planned],
    rejected: Sequence[Rejected],
    sentences: Sequence[str],
) -> None:
    from mm.pages.frame import write_page
    from mm.pages.plan_page import PlanReport, plan_page

    world, hardware = on
    command = shlex.join(["python", "-m", "mm", *argv])
    config = next(x for x in args.positional if "=" not in x)
    page = PlanReport(
        found=found,
        rejected=rejected,
        sentences=sentences,
        hardware=hardware.name,
        world=world,
        command=command,
        config_file=config,
    )
    write_page(plan_page(page), args.report)


def _explain_one(cfg: Config, on: tuple[int, Hardware], found: Prediction, policies: dict[str, str]) -> None:
    """Of a layout that no search has found. Where it is no candidate of one, it is predicted on faster
    hardware alone."""
    from mm.plan.blueprint import draw_up
    from mm.predict.step import shortfall
    from mm.search.candidate import of_config
    from mm.search.explain import faster_lines, seconds_lines
    from mm.search.limits import space_of
    from mm.search.predictor import Judged

    world, hardware = on
    candidate = of_config(cfg, world, policies)
    if candidate is not None and cfg.run.engine == "polyrank":
        judged = Judged(candidate, found, shortfall(found, hardware))
        _explain(cfg, on, judged, space_of(draw_up(candidate.config(cfg), world)), {})
        return
    why = "a module's ranks are not a range, or train.recompute is by module"
    if cfg.run.engine != "polyrank":
        why = f"run.engine={cfg.run.engine} is predicted for given layouts"
    _print("what the seconds of the mean rank go to:", seconds_lines(found))
    _print("what other hardware would give:", faster_lines(cfg, world, hardware, found))
    print(f"other layouts near it are not tried: {why}; another --layout FILE predicts one")


def _explain(
    cfg: Config, on: tuple[int, Hardware], found: Judged, space: Space, known: Mapping[Candidate, Judged]
) -> None:
    from mm.search.explain import change_lines, neighbours, seconds_lines

    assert found.prediction is not None
    _print("what the seconds of the mean rank go to:", seconds_lines(found.prediction))
    around = neighbours(cfg, on, space, found, known)
    _print("what one change would give:", change_lines(found, around))


def _print(head: str, lines: Sequence[str]) -> None:
    print("\n  ".join([head, *lines]), flush=True)


COMMAND = Command(
    _run,
    "plan CONFIG --devices N --hardware NAME: the best layouts, predicted; --layout FILE predicts one",
    OVERRIDES,
    _options,
)
