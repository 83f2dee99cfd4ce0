"""`plan CONFIG --devices N --hardware NAME`: which layout to run, predicted; or what one layout takes."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.command import MOST_RANKS, OVERRIDES, Command, config_of
from mm.errors import Refused

if TYPE_CHECKING:
    from mm.config.schema import Config
    from mm.pages.plan_page import Planned
    from mm.predict.hardware import Hardware
    from mm.search.predictor import Judged
    from mm.search.rejected import Rejected


DRAWN = 4  # steps of ragged data of which --layout says mean and deviation
WIDTH = 120  # columns that the table needs, also where the output is a file


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", type=int, metavar="N", help="devices, one a rank (default run.nproc)")
    add("--hardware", default="h100", metavar="NAME|FILE", help="of configs/hardware (default h100)")
    add("--layout", type=Path, metavar="FILE", help="predict this layout file in the place of a search")
    add("--top", type=int, default=3, metavar="K", help="how many of the best (default 3)")
    add("--seconds", type=float, default=50.0, help="processor seconds that the search may take (default 50)")
    add("--json", type=Path, metavar="OUT", help="write the result here")
    add("--out", type=Path, metavar="FILE", help="write the best as a layout file, for compare and train")
    add("--report", type=Path, metavar="OUT", help="write a page here: one HTML file (docs/reports.md)")
    add("--explain", action="store_true", help="what each second goes to, and what would help most")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    cfg = config_of(args)
    world = args.devices if args.devices is not None else cfg.run.nproc
    if not 1 <= world <= MOST_RANKS:
        raise Refused(f"--devices {world}; needed: 1 to {MOST_RANKS}")
    if args.top < 1 or not args.seconds > 0:
        raise Refused(f"--top {args.top} --seconds {args.seconds}; needed: at least 1, and more than 0")
    from mm.predict.hardware import load_hardware
    from mm.search.predictor import on_nodes

    hardware = load_hardware(args.hardware)
    cfg = on_nodes(cfg, world, hardware)
    if args.report is not None and not args.report.absolute().parent.is_dir():
        raise Refused(f"--report {args.report}: there is no folder {args.report.parent}")
    if args.layout is not None:
        result = _one(args, argv, cfg, (world, hardware))
    else:
        result = _search(args, argv, cfg, (world, hardware))
    if args.json is not None:
        args.json.write_text(json.dumps(result))
    return 0


def _search(
    args: argparse.Namespace, argv: list[str], cfg: Config, on: tuple[int, Hardware]
) -> dict[str, Any]:
    from rich.console import Console

    from mm.predict.count.left_out import left_out
    from mm.search.plan import Planner
    from mm.search.predictor import Predictor
    from mm.search.written import as_json, layout_file, summary, table

    world, hardware = on
    if cfg.run.engine != "polyrank" or isinstance(cfg.train.recompute, dict):
        raise Refused(
            f"run.engine={cfg.run.engine} and train.recompute={cfg.train.recompute}: a search is of this "
            "program, and tries what all modules recompute alike; needed: run.engine=polyrank and "
            "train.recompute=true or false, or one layout, --layout FILE"
        )
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    with console.status(f"{world} {hardware.name}: bounding candidates") as status:

        def tell(goal: str, predicted: int, best: float) -> None:
            status.update(f"{world} {hardware.name}, {goal}: {predicted} predicted, best {best:.4g} s")

        planner = Planner(cfg, world, hardware, top=args.top, limit=args.seconds, tell=tell)
        plan = planner.plan()
    console.print(table(plan))
    for line in summary(plan):
        console.print(line, markup=False)
    console.print("left out:")
    for rejected in plan.rejected[:12]:
        console.print(f"  {rejected.count:,} of {rejected.layout}: {rejected.why}", markup=False)
    best = plan.best[0]
    lacking = left_out(Predictor(cfg, world, hardware).blueprint(best.candidate.config(cfg)))
    for sentence in lacking:
        console.print(f"not counted as it runs: {sentence}", markup=False)
    text = layout_file(best, cfg, shlex.join(["python", "-m", "mm", *argv]))
    if args.out is not None:
        args.out.write_text(text)
    console.print(f"the best as a layout file{f', in {args.out}' if args.out else ''}:\n{text}", markup=False)
    if args.explain:
        _explain(cfg, world, hardware, best)
    if args.report is not None:
        from mm.pages.plan_page import found_by

        found = found_by(plan, lambda one: layout_file(one, cfg, shlex.join(["python", "-m", "mm", *argv])))
        _report(args, argv, on, found, plan.rejected, [*summary(plan), *_not_counted(lacking)])
    return as_json(plan, cfg) | {"not_counted": lacking}


def _not_counted(sentences: Sequence[str]) -> list[str]:
    """What counts leave out, for a page."""
    return [f"Not counted as it runs: {sentence}." for sentence in sentences]


def _one(args: argparse.Namespace, argv: list[str], cfg: Config, on: tuple[int, Hardware]) -> dict[str, Any]:
    """What one layout takes."""
    world, hardware = on
    from mm.config.schema import load_layout_file, with_layout
    from mm.predict.count.left_out import left_out
    from mm.predict.step import shortfall
    from mm.search.candidate import of_config
    from mm.search.predictor import Judged, Predictor
    from mm.search.written import entry

    layout, schedule = load_layout_file(args.layout)
    try:
        made = with_layout(cfg, layout, schedule)
        predictor = Predictor(made, world, hardware)
        blueprint = predictor.blueprint(made)
        found = predictor.of_config(made)
    except Refused as error:
        raise Refused(f"{args.layout}: {error}") from error
    print(f"{args.layout} on {world} {hardware.name}, {predictor.note}:")
    print(f"  {found.step_s:.4g} s a step, {found.tokens_per_s_per_device:.4g} tokens/s a device,")
    print(f"  {found.tflops_per_device:.4g} TFLOPS a device, idle {found.bubble_fraction:.1%},")
    if found.paper_tflops_per_device is not None and cfg.run.engine == "megatron":
        print(f"  {found.paper_tflops_per_device:.4g} by the published metric,")
    print(f"  {found.peak_memory_bytes / 1e9:.3g} GB on rank {found.fullest}")
    lacking = left_out(blueprint)
    for sentence in lacking:
        print(f"  not counted as it runs: {sentence}")
    drawn = predictor.drawn(made, DRAWN)
    if drawn is not None:
        print(f"  {DRAWN} drawn steps: {drawn.mean_s:.4g} s in the mean, {drawn.jitter_s:.2g} s deviation")
    why = shortfall(found, hardware)
    if why is not None:
        print(f"  it does not fit: {why}")
    rejected = [] if why is None else [{"layout": str(args.layout), "why": why}]
    if args.report is not None:
        from mm.pages.plan_page import Planned

        one = Planned(args.layout.stem, "", found, args.layout.read_text(encoding="utf-8"))
        said = [f"Samples: {predictor.note}."] + ([f"It does not fit: {why}."] if why is not None else [])
        _report(args, argv, on, [one], [], [*said, *_not_counted(lacking)])
    if args.explain:
        candidate = of_config(made, world, dict(blueprint.policies))
        if candidate is None:
            raise Refused(
                f"--explain {args.layout}: a module's ranks are not a range, or train.recompute is by "
                "module; needed: a-b or all, and one train.recompute of all modules"
            )
        _explain(made, world, hardware, Judged(candidate, found, why))
    jitter = {} if drawn is None else {"mean_step_s": drawn.mean_s, "jitter_s": drawn.jitter_s}
    found_one = entry(None, found, made) | jitter
    return {"candidates": [found_one], "rejected": rejected, "not_counted": lacking}


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


def _explain(cfg: Config, world: int, hardware: Hardware, found: Judged) -> None:
    from mm.plan.blueprint import draw_up
    from mm.search.explain import change_lines, neighbours, seconds_lines
    from mm.search.limits import space_of

    assert found.prediction is not None
    print("what the seconds of the mean rank go to:")
    for line in seconds_lines(found.prediction):
        print(f"  {line}")
    space = space_of(draw_up(found.candidate.config(cfg), world))
    print("what one change would give:")
    for line in change_lines(found, neighbours(cfg, world, hardware, space, found)):
        print(f"  {line}")


COMMAND = Command(
    _run,
    "plan CONFIG --devices N --hardware NAME: the best layouts, predicted; --layout FILE predicts one",
    OVERRIDES,
    _options,
)
