"""The command line. Options and key=value overrides come in any order.

Exit codes: 0 done; 2 refused (usage, config, layout); 3 data; 4 checkpoint; 5 numerics; 1 anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mm import launch
from mm.config import Config, load_config
from mm.errors import PolyrankError, Refused


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code and prints one message for a known kind of failure."""
    args = _parser().parse_intermixed_args(list(argv))
    try:
        return args.run(args, list(argv)) or 0
    except PolyrankError as error:
        _tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _tell("interrupted")
        return 1


def _tell(message: str) -> None:
    """Say it once: all ranks fail alike, so rank 0 speaks for them."""
    import os

    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """One flat parser a command: sub-parsers would forbid options between positional arguments."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", choices=sorted(COMMANDS), help="; ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items())
    )
    parser.add_argument("words", nargs="*", help="CONFIG and key=value overrides, or the command's own words")
    parser.add_argument("--nproc", type=int, help="train, compare: local ranks to start (default run.nproc)")
    parser.add_argument("--dry-run", action="store_true", help="train: print the plan and start nothing")
    parser.add_argument(
        "--layouts", nargs="+", type=Path, help="compare: layout files, the first the baseline"
    )
    parser.add_argument("--steps", type=int, default=4, help="compare: steps a round (default 4)")
    parser.add_argument("--rounds", type=int, default=3, help="compare: interleaved rounds (default 3)")
    parser.add_argument("--json", type=Path, help="compare: write the result here")
    parser.add_argument("--out", type=Path, help="data prepare: folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="data prepare: seed")
    parser.set_defaults(run=_dispatch)
    return parser


def _dispatch(args: argparse.Namespace, argv: list[str]) -> int | None:
    return COMMANDS[args.command][0](args, argv)


def _config(args: argparse.Namespace) -> Config:
    files = [w for w in args.words if "=" not in w]
    if len(files) != 1:
        raise Refused(f"{args.command} needs one CONFIG file, given {files or 'none'}")
    return load_config(Path(files[0]), [w for w in args.words if "=" in w])


def _ranks(args: argparse.Namespace, cfg: Config) -> int:
    if args.nproc is not None and args.nproc < 1:
        raise Refused(f"--nproc {args.nproc}; needed: at least 1")
    return args.nproc or cfg.run.nproc


def _train(args: argparse.Namespace, argv: list[str]) -> int | None:
    cfg = _config(args)
    world = launch.world_size() if launch.launched() else _ranks(args, cfg)
    from mm.job import draw_up

    blueprint = draw_up(cfg, world)
    if args.dry_run:
        from mm.plan_text import dry_run

        print(dry_run(blueprint))
        return 0
    if not launch.launched():
        return launch.launch_local(world, argv)
    from mm.trainer import train

    train(blueprint)
    return 0


def _compare(args: argparse.Namespace, argv: list[str]) -> int | None:
    cfg = _config(args)
    if not args.layouts:
        raise Refused("compare needs --layouts FILE [FILE ...], the first being the baseline")
    if args.steps < 2 or args.rounds < 1:
        raise Refused("compare needs --steps of at least 2 (the first warms up) and --rounds of at least 1")
    world = launch.world_size() if launch.launched() else _ranks(args, cfg)
    from mm.compare import compare, make_runs

    runs = make_runs(cfg, world, args.layouts)
    if not launch.launched():
        return launch.launch_local(world, argv)
    compare(cfg, runs, steps=args.steps, rounds=args.rounds, json_out=args.json)
    return 0


def _data(args: argparse.Namespace, argv: list[str]) -> int | None:
    verb, *rest = args.words or [""]
    from mm.data import digits, inspect

    if verb == "prepare":
        if rest != ["digits"] or args.out is None:
            raise Refused("data prepare needs a recipe and a folder: data prepare digits --out DIR")
        for shard in digits.prepare_digits(args.out, args.seed):
            print(shard)
    elif verb == "index" and rest:
        print(inspect.index_text(rest, Path()))
    elif verb == "inspect" and rest:
        print(inspect.inspect_text(rest, Path()))
    else:
        raise Refused("needed: data prepare digits --out DIR, data index SHARDS, or data inspect SHARDS")
    return 0


def _checkpoint(args: argparse.Namespace, argv: list[str]) -> int | None:
    verb, *rest = args.words or [""]
    if verb not in ("inspect", "verify") or len(rest) != 1:
        raise Refused("needed: checkpoint inspect PATH, or checkpoint verify PATH")
    from mm.checkpoint import inspect_text, verify_text

    print(inspect_text(Path(rest[0])) if verb == "inspect" else verify_text(Path(rest[0])))
    return 0


def _doctor(args: argparse.Namespace, argv: list[str]) -> int | None:
    from mm.doctor import examine

    text, healthy = examine()
    print(text)
    return 0 if healthy else 1


COMMANDS = {
    "train": (_train, "train CONFIG [key=value ..]"),
    "compare": (_compare, "compare CONFIG --layouts FILE [FILE ..]"),
    "data": (_data, "data prepare|index|inspect .."),
    "checkpoint": (_checkpoint, "checkpoint inspect|verify PATH"),
    "doctor": (_doctor, "examine this machine"),
}
