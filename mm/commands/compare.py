"""`compare CONFIG --layouts FILE ..`: the same model, data and seed under several layouts."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import (
    OVERRIDES,
    Command,
    announce,
    check_writable,
    config_of,
    nproc_option,
    one_config_of,
    stage_option,
    world_of,
)
from mm.errors import Refused
from mm.ranks import launch

if TYPE_CHECKING:
    from mm.compare.result import Comparison
    from mm.compare.rounds import Run
    from mm.config.schema import Config


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layouts", nargs="+", action="extend", default=[], metavar="FILE", help="the first is the baseline")
    nproc_option(parser)
    stage_option(parser)
    add("--steps", type=int, default=4, help="steps a round, of which the first warms up (default 4)")
    add("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    add("--no-watch", action="store_true", help="only time steps: no memory, no timelines, no bounds")
    add("--peak", type=float, metavar="TFLOPS", help="of a device, for MFU: 989 for bfloat16 on an H100")
    add("--json", type=Path, metavar="OUT", help="write the result here")
    add("--report", type=Path, metavar="OUT", help="write a page here: one HTML file (docs/reports.md)")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    # --layouts takes every argument that follows it: overrides too, unless there is such a file (lr=1/a).
    overrides = [x for x in args.layouts if "=" in x and not Path(x).is_file()]
    layouts = [Path(x) for x in args.layouts if x not in overrides]
    if not layouts:
        raise Refused("needed: --layouts FILE [FILE ...], the first being the baseline")
    if not any("=" not in x for x in args.positional):
        raise Refused("needed: one CONFIG file, before --layouts, which takes all the files that follow it")
    cfg = one_config_of(args, overrides)
    if args.steps < 2 or args.rounds < 1:
        raise Refused(
            f"--steps {args.steps} --rounds {args.rounds}; needed: at least 2 steps (the first warms up) "
            "and at least 1 round"
        )
    if args.peak is not None and not 0 < args.peak < math.inf:
        raise Refused(f"--peak {args.peak:g}; needed: a device's peak in TFLOPS, above 0, such as 989")
    check_writable(json=args.json, report=args.report)
    world = world_of(args, cfg)
    from mm.compare.variants import check_variants, variants

    found = variants(_long_enough(cfg, args.steps), layouts)
    if not launch.launched():
        check_variants(found, world)

    def runs() -> list[Run]:
        from mm.compare.rounds import make_runs

        return make_runs(found, world)

    if not launch.launched():
        timed = f"{args.rounds} rounds of {args.steps} steps under each of {len(found)} layouts"
        announce(args, world, timed)
        return launch.launch_local(world, argv, runs)
    from mm.compare.rounds import Settings, compare
    from mm.compare.table import show
    from mm.compare.written import write_json
    from mm.pages.compare_page import compare_page
    from mm.pages.frame import write_page

    settings = Settings(
        steps=args.steps,
        rounds=args.rounds,
        peak_tflops=args.peak,
        command=shlex.join(["python", "-m", "mm", *argv]),
        config=Path(next(x for x in args.positional if "=" not in x)),
        watch=not args.no_watch,
        overrides=typed(args, overrides),
    )

    def publish(result: Comparison) -> None:
        if args.json is not None:
            write_json(result, args.json)
        show(result)
        if args.report is not None:
            write_page(compare_page(result), args.report)

    result = compare(runs(), settings, publish)
    if result is not None:
        publish(result)
    return 0


def typed(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The overrides of the command line, with which `train` runs what is compared.

    Of a stage its own layout and schedule are taken out of the config, as they would hold before those of a
    layout file.
    """
    found = [*(x for x in args.positional if "=" in x), *overrides]
    if args.stage is None:
        return found
    from mm.compare.entry import flow

    rest = config_of(args, overrides, stages=True).stages
    own = next(dict(stage) for stage in rest if stage.get("name") == args.stage)
    bare = {key: value for key, value in own.items() if key not in ("layout", "schedule")}
    stages = [bare if stage.get("name") == args.stage else dict(stage) for stage in rest]
    found += [f"stages={flow(stages)}", f"--stage={args.stage}"]
    return found + [f"schedule.{key}={flow(value)}" for key, value in own.get("schedule", {}).items()]


def _long_enough(cfg: Config, steps: int) -> Config:
    """The run with as many steps as a round has, the watched ones included."""
    from mm.compare.result import WATCHED

    train = cfg.train.model_copy(update={"steps": max(cfg.train.steps, steps + WATCHED)})
    return cfg.model_copy(update={"train": train})


COMMAND = Command(
    _run,
    "compare CONFIG --layouts FILE [FILE ..]: same model, data and seed under several layouts",
    OVERRIDES,
    _options,
)
