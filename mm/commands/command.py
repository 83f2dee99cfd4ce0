"""A command of the command line, and what several of them do with their arguments. Needs no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm.errors import Refused
from mm.ranks import launch

if TYPE_CHECKING:
    from mm.config.schema import Config
    from mm.config.stages import Stage

MOST_RANKS = 16384  # of one plan: a mistyped number should not plan, or start, for hours
OVERRIDES = "CONFIG and key=value overrides, such as train.lr=0.001"


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    run: does it, given its parsed arguments and the whole command line; returns the exit code. summary: one
    line of help. positional: help on its positional arguments, which are in `positional` of the parsed ones.
    options: adds its options to a parser.

    Importing torch takes seconds, which help and refusals must not wait for, and doctor runs where packages
    are missing. So a command's file imports none of them at its top.
    """

    run: Callable[[argparse.Namespace, list[str]], int]
    summary: str
    positional: str
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None


def config_of(args: argparse.Namespace, extra: Sequence[str] = (), *, stages: bool = False) -> Config:
    """The config that positional arguments name, with their overrides and those in `extra`.

    stages: whether the command takes a config with stages; where not, it is refused.
    """
    from mm.config.schema import load_config

    given = [*args.positional, *extra]
    files = [x for x in given if "=" not in x]
    if len(files) != 1:
        stray = next((f for f in files[1:] if not Path(f).suffix.startswith(".y")), None)
        hint = "" if stray is None else f"; an override is key=value, so {stray}=.."
        raise Refused(f"needed: one CONFIG file, given {' and '.join(files) or 'none'}{hint}")
    cfg = load_config(Path(files[0]), [x for x in given if "=" in x])
    if cfg.stages and not stages:
        raise Refused(
            f"{files[0]} has stages; needed: the config of one, such as the config.yaml in its run's folder"
        )
    return cfg


def stage_option(parser: argparse.ArgumentParser) -> None:
    """--stage, as every command that is about one stage of a config has it."""
    parser.add_argument("--stage", metavar="NAME", help="this stage of the config alone")


def one_config_of(args: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    """As config_of(), of the one stage that --stage names where the config has stages."""
    from mm.config.stages import stages_of

    return only_stage(stages_of(config_of(args, extra, stages=True), args.stage)).cfg


def check_writable(**outputs: Path | None) -> None:
    """Refuse files that could not be written in the end, before the work. outputs: by option."""
    for option, out in outputs.items():
        if out is None:
            continue
        folder = out.absolute().parent
        if out.is_dir():
            raise Refused(f"--{option} {out}: this is a folder; needed: a file, such as {out / option}")
        if not folder.is_dir():
            raise Refused(f"--{option} {out}: there is no folder {out.parent}; needed: mkdir -p {out.parent}")
        if not os.access(out if out.exists() else folder, os.W_OK):
            raise Refused(f"--{option} {out}: it may not be written; needed: another folder, or the right to")


def only_stage(stages: Sequence[Stage]) -> Stage:
    """The one stage that a command is about; raises Refused where there are several."""
    if len(stages) > 1:
        raise Refused(f"the config has stages; needed: --stage, one of {', '.join(s.name for s in stages)}")
    return stages[0]


def world_of(args: argparse.Namespace, cfg: Config) -> int:
    """Ranks of the job: those that exist, or those to start."""
    if args.nproc is not None and args.nproc < 1:
        raise Refused(f"--nproc {args.nproc}; needed: at least 1")
    if not launch.launched():
        world: int = args.nproc or cfg.run.nproc
        if world > MOST_RANKS:
            raise Refused(f"{world} ranks (--nproc, run.nproc); needed: at most {MOST_RANKS}")
        return world
    if args.nproc not in (None, launch.world_size()):
        raise Refused(
            f"--nproc {args.nproc}, but {launch.world_size()} ranks were started; leave --nproc out"
        )
    launch.follow_launcher()
    return launch.world_size()


def announce(args: argparse.Namespace, world: int, what: str) -> None:
    """Print one line before ranks start: they are silent while they import torch."""
    config = next(x for x in args.positional if "=" not in x)
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    print(f"{config}: starting {ranks} on this machine, {what}", flush=True)


def nproc_option(parser: argparse.ArgumentParser) -> None:
    """--nproc, as every command that starts ranks has it."""
    parser.add_argument("--nproc", type=int, help="local ranks to start outside torchrun (default run.nproc)")
