"""`train CONFIG`: run a job, or print its plan."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import (
    OVERRIDES,
    Command,
    announce,
    config_of,
    nproc_option,
    only_stage,
    stage_option,
    world_of,
)
from mm.commands.elastic import for_world
from mm.commands.virtual import WITH_VIRTUAL, virtual, virtual_options, virtual_world
from mm.errors import Refused, of_stage
from mm.ranks import launch
from mm.ranks.claim import claimed
from mm.ranks.stop import Stop

if TYPE_CHECKING:
    from mm.config.schema import Config
    from mm.config.stages import Stage
    from mm.plan.blueprint import Blueprint


def _options(parser: argparse.ArgumentParser) -> None:
    nproc_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start and write nothing")
    stage_option(parser)
    parser.add_argument(
        "--no-data", action="store_true", help="with --dry-run: made-up samples, for data that are not here"
    )
    virtual_options(parser)
    parser.add_argument("--draw", type=Path, metavar="DIR", help="with --dry-run: draw the step, into DIR")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    # From here on a request to end ends the run well: importing takes seconds, and so does a step.
    with Stop(rank=launch.launched()) as stop:
        return _run_until(stop, args, argv)


def _run_until(stop: Stop, args: argparse.Namespace, argv: list[str]) -> int:
    if args.draw is not None and not args.dry_run:
        raise Refused(f"--draw {args.draw} without --dry-run; a step that ran is drawn by run.trace=STEP")
    if args.no_data and not args.dry_run:
        raise Refused("--no-data without --dry-run; a run needs data")
    from mm.config.stages import stages_of

    cfg = config_of(args, stages=True)
    stages = stages_of(cfg, args.stage)
    if args.virtual is not None:
        cfg = only_stage(stages).cfg
        return virtual(args, cfg, virtual_world(args, cfg))
    if any(getattr(args, name) != default for name, default in WITH_VIRTUAL.items()):
        raise Refused(f"--{', --'.join(WITH_VIRTUAL)} go with --virtual; ranks to start: --nproc")
    world = world_of(args, cfg)
    lead = not launch.launched() or (os.environ["RANK"] == "0" and not launch.held_by_launcher())
    stages = [
        stage._replace(cfg=for_world(stage.cfg, world, lead=lead, write=not args.dry_run)) for stage in stages
    ]
    from mm.commands.preflight import check_paths
    from mm.plan.blueprint import check_outline

    # Without torch, whose import takes seconds: a mistyped key need not wait for it.
    for stage in stages:
        with of_stage(stage.name):
            if not launch.launched():
                look = lambda why: print(f"{why}; looking for what would work", flush=True)  # noqa: E731
                check_outline(stage.cfg, world, look)
            check_paths(stage.cfg, write=not args.dry_run, data=not args.no_data)
    if args.dry_run:
        from mm.commands.dry_run import dry_run

        for stage in stages:
            title = f"stage {stage.name}: {stage.cfg.train.steps} steps\n" if stage.name else ""
            draw = args.draw and args.draw / stage.name
            print(title + dry_run(_check(stage, world), draw, data=not args.no_data))
        return 0
    if not launch.launched():
        announce(args, world, f"run folder {cfg.run.dir}")
        folders = [Path(stage.cfg.run.dir) for stage in stages]
        with claimed(folders, say=lambda line: print(line, flush=True)) as claims:
            return launch.launch_local(
                world, argv, lambda: [_check(stage, world) for stage in stages], stop, claims
            )
    from mm.train.trainer import Run, train

    runs = [Run(_check(stage, world), stage.name, stage.before) for stage in stages]

    def last() -> None:
        if os.environ["RANK"] == "0":
            _report([stage.cfg for stage in stages])

    try:
        train(runs, stop, last)
    finally:
        last()
    return 0


def _report(configs: Sequence[Config]) -> None:
    """Write the pages that a run asks for, at its end or where it failed. A page that cannot be written is a
    warning: the run is what matters."""
    from mm.pages.run_page import write_report

    for run in (cfg.run for cfg in configs if cfg.run.report):
        try:
            print(f"report: {write_report(Path(run.dir))}", flush=True)
        except (Refused, OSError) as error:
            print(f"warning: no report: {error}", file=sys.stderr, flush=True)


def _check(stage: Stage, world: int) -> Blueprint:
    """The blueprint of a job, or of a stage; raises Refused or CheckpointError where it cannot start."""
    from mm.commands.preflight import check_start
    from mm.plan.blueprint import draw_up

    with of_stage(stage.name):
        blueprint = draw_up(stage.cfg, world)
        check_start(stage.cfg)
        return blueprint


COMMAND = Command(_run, "train CONFIG: run a job", OVERRIDES, _options)
