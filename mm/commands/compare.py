"""`compare CONFIG --layouts FILE ..`: the same model, data and seed under several layouts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mm.commands.command import OVERRIDES, Command, announce, config_of, nproc_option, world_of
from mm.errors import Refused
from mm.ranks import launch

if TYPE_CHECKING:
    from mm.compare.rounds import Run


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layouts", nargs="+", action="extend", default=[], metavar="FILE", help="the first is the baseline")
    nproc_option(parser)
    add("--steps", type=int, default=4, help="steps a round, of which the first warms up (default 4)")
    add("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    add("--json", type=Path, metavar="OUT", help="write the result here")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    # --layouts takes every argument that follows it; a layout file's name has no "=".
    layouts = [Path(x) for x in args.layouts if "=" not in x]
    if not layouts:
        raise Refused("needed: --layouts FILE [FILE ...], the first being the baseline")
    if not any("=" not in x for x in args.positional):
        raise Refused("needed: one CONFIG file, before --layouts, which takes all the files that follow it")
    cfg = config_of(args, [x for x in args.layouts if "=" in x])
    if args.steps < 2 or args.rounds < 1:
        raise Refused(
            f"--steps {args.steps} --rounds {args.rounds}; needed: at least 2 steps (the first warms up) "
            "and at least 1 round"
        )
    world = world_of(args, cfg)
    from mm.compare.variants import check_variants, variants

    found = variants(cfg, layouts)
    if not launch.launched():
        check_variants(found, world)

    def runs() -> list[Run]:
        from mm.compare.rounds import make_runs

        return make_runs(found, world)

    if not launch.launched():
        timed = f"{args.rounds} rounds of {args.steps} steps under each of {len(found)} layouts"
        announce(args, world, timed)
        return launch.launch_local(world, argv, runs)
    from mm.compare.rounds import compare

    compare(cfg, runs(), steps=args.steps, rounds=args.rounds, json_out=args.json)
    return 0


COMMAND = Command(
    _run,
    "compare CONFIG --layouts FILE [FILE ..]: same model, data and seed under several layouts",
    OVERRIDES,
    _options,
)
