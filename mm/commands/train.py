"""`train CONFIG`: run a job, or print its plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import OVERRIDES, Command, announce, config_of, nproc_option, world_of
from mm.commands.virtual import WITH_VIRTUAL, virtual, virtual_options, virtual_world
from mm.errors import Refused
from mm.ranks import launch
from mm.ranks.stop import Stop

if TYPE_CHECKING:
    from mm.config.schema import Config
    from mm.plan.blueprint import Blueprint


def _options(parser: argparse.ArgumentParser) -> None:
    nproc_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start and write nothing")
    virtual_options(parser)
    parser.add_argument("--draw", type=Path, metavar="DIR", help="with --dry-run: draw the step, into DIR")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    # From here on a request to end ends the run well: importing takes seconds, and so does a step.
    with Stop(rank=launch.launched()) as stop:
        return _run_until(stop, args, argv)


def _run_until(stop: Stop, args: argparse.Namespace, argv: list[str]) -> int:
    if args.draw is not None and not args.dry_run:
        raise Refused(f"--draw {args.draw} without --dry-run; a step that ran is drawn by run.trace=STEP")
    cfg = config_of(args)
    if args.virtual is not None:
        return virtual(args, cfg, virtual_world(args, cfg))
    if any(getattr(args, name) != default for name, default in WITH_VIRTUAL.items()):
        raise Refused(f"--{', --'.join(WITH_VIRTUAL)} go with --virtual; ranks to start: --nproc")
    world = world_of(args, cfg)
    from mm.commands.preflight import check_paths
    from mm.plan.blueprint import check_outline

    # Without torch, whose import takes seconds: a mistyped key need not wait for it.
    if not launch.launched():
        check_outline(cfg, world, lambda why: print(f"{why}; looking for what would work", flush=True))
    check_paths(cfg, write=not args.dry_run)
    if args.dry_run:
        from mm.commands.dry_run import dry_run

        print(dry_run(_check(cfg, world), args.draw))
        return 0
    if not launch.launched():
        announce(args, world, f"run folder {cfg.run.dir}")
        return launch.launch_local(world, argv, lambda: _check(cfg, world), stop)
    from mm.train.trainer import train

    train(_check(cfg, world), stop)
    return 0


def _check(cfg: Config, world: int) -> Blueprint:
    """The job's blueprint; raises Refused or CheckpointError where it cannot start."""
    from mm.commands.preflight import check_start
    from mm.plan.blueprint import draw_up

    blueprint = draw_up(cfg, world)
    check_start(cfg)
    return blueprint


COMMAND = Command(_run, "train CONFIG: run a job", OVERRIDES, _options)
