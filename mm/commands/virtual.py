"""`train CONFIG --virtual RANK`: one step of a rank of any job, on fake tensors and groups."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.commands.command import MOST_RANKS
from mm.errors import Refused

if TYPE_CHECKING:
    from mm.config.schema import Config

MANY = ("all", "programs")
WITH_VIRTUAL = {"world": None, "json": None, "skew": 1.0, "twins": 1, "workers": None}  # options: defaults
MOST_TRACED = 64  # ranks that "all" traces


def virtual_options(parser: argparse.ArgumentParser) -> None:
    """--virtual and what goes with it."""
    parser.add_argument(
        "--virtual",
        metavar="RANK",
        help="run one step of this rank without hardware or other ranks, and report memory, calls and waits; "
        "all: of every rank, programs: of one rank of each kind, and match their calls",
    )
    parser.add_argument("--world", type=int, metavar="N", help="with --virtual: ranks of the job")
    parser.add_argument("--json", type=Path, metavar="OUT", help="with --virtual: write the report there")
    parser.add_argument(
        "--skew",
        type=float,
        default=1.0,
        metavar="X",
        help="with --virtual: rows of the fullest expert over the mean",
    )
    parser.add_argument(
        "--twins",
        type=int,
        default=1,
        metavar="N",
        help="with --virtual programs: ranks of each kind that are traced besides its first, to be equal",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="with --virtual all or programs: processes; default: one a core",
    )


def virtual_world(args: argparse.Namespace, cfg: Config) -> int:
    """Ranks of the job that --virtual is about. Raises Refused for options that make no sense."""
    world = int(args.world or cfg.run.nproc)
    if not 1 <= world <= MOST_RANKS:
        raise Refused(f"--world {world}; needed: 1 to {MOST_RANKS}")
    if args.virtual not in MANY and not (args.virtual.isdecimal() and int(args.virtual) < world):
        raise Refused(f"--virtual {args.virtual} of {world} ranks; needed: 0-{world - 1}, all or programs")
    if args.virtual == "all" and world > MOST_TRACED:
        raise Refused(f"--virtual all of {world} ranks; needed: at most {MOST_TRACED}, or --virtual programs")
    if args.virtual == "programs" and cfg.run.device == "cpu":
        raise Refused("--virtual programs with run.device=cpu; needed: run.device=cuda, or --virtual all")
    if args.twins < 0 or (args.workers is not None and args.workers < 1):
        raise Refused(f"--twins {args.twins} --workers {args.workers}; needed: at least 0 and 1")
    if not args.skew >= 1.0:
        raise Refused(f"--skew {args.skew}; needed: at least 1, which is even")
    return world


def virtual(args: argparse.Namespace, cfg: Config, world: int) -> int:
    """Run it and print, or write, what it found; 1 where calls do not meet."""
    import torch

    from mm.plan.blueprint import draw_up
    from mm.virtual.accelerator import accelerator
    from mm.virtual.programs import match_all, match_representatives
    from mm.virtual.report import as_json, match_json, match_text, text
    from mm.virtual.run import virtual_rank
    from mm.virtual.samples import virtual_data

    blueprint = draw_up(cfg, world)
    device = torch.device("cpu") if cfg.run.device == "cpu" else accelerator()
    code, out = 0, None
    if args.virtual not in MANY:
        data = virtual_data(blueprint)
        trace = virtual_rank(blueprint, int(args.virtual), device, data=data, skew=args.skew)
        print(text(trace))
        out = as_json(trace)
    else:
        workers = args.workers or os.cpu_count() or 1
        if args.virtual == "all":
            traces, result = match_all(blueprint, device, skew=args.skew, workers=workers)
        else:
            traces, result = match_representatives(
                blueprint, device, skew=args.skew, twins=args.twins, workers=workers
            )
        print("\n\n".join(map(text, traces)), match_text(result), sep="\n\n")
        ranks: list[dict[str, Any]] = [as_json(t) for t in traces]
        out = {"world": world, "ranks": ranks, "match": match_json(result)}
        code = 0 if result.ok else 1
    if args.json is not None:
        args.json.write_text(json.dumps(out))
    return code
