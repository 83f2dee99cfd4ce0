"""The command line: `python -m mm COMMAND ...`. Options and key=value overrides come in any order.

Exit codes: 0 done; 2 refused (usage, config, layout); 3 data; 4 checkpoint; 5 numerics; 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mm.errors import PolyrankError, Refused
from mm.ranks import launch
from mm.ranks.stop import Stop

if TYPE_CHECKING:
    from mm.commands.compare import Run
    from mm.config.schema import Config
    from mm.plan.blueprint import Blueprint

# Handlers import what they need themselves: importing torch costs seconds, which help and refusals can do
# without, and doctor must run where packages are missing.


MOST_RANKS = 16384  # of one plan: a mistyped number should not plan, or start, for hours


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Of a failing job one rank says why, in one message."""
    try:
        return _run(list(argv))
    except PolyrankError as error:
        if launch.reports(error):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if launch.reports(interrupt):
            print("interrupted", file=sys.stderr, flush=True)
        return 1
    except ModuleNotFoundError as error:
        if launch.reports(error):
            print(
                f"{error.name} is not installed for {sys.executable}; needed: pip install -e . with it, or "
                "the Python of `make train`, .venv/bin/python",
                file=sys.stderr,
                flush=True,
            )
        return 1
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if launch.reports(error):
            # A file of the user's is named in words; without a name it is the network's, whose place matters.
            if isinstance(error, OSError) and error.filename is not None:
                print(f"{error.filename}: {error.strerror}", file=sys.stderr, flush=True)
            else:
                if launch.launched():
                    print(f"rank {os.environ['RANK']} failed:", file=sys.stderr)
                traceback.print_exc()
        return 1


def _run(argv: list[str]) -> int:
    named = next((i for i, word in enumerate(argv) if word in COMMANDS), None)
    if named is None:
        if "-h" in argv or "--help" in argv:
            print(overview())
            return 0
        given = next((word for word in argv if not word.startswith("-")), None)
        near = difflib.get_close_matches(given or "", COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise Refused(f"unknown command {given}; {hint}" if given else f"no command; {hint}")
    command = COMMANDS[argv[named]]
    parser = _Parser(f"python -m mm {argv[named]}", command)
    args = parser.parse_intermixed_args(argv[:named] + argv[named + 1 :])
    return command.run(args, argv)


def overview() -> str:
    """The help of the whole command line."""
    lines = [__doc__.strip(), "", "commands (each has --help):"]
    return "\n".join(lines + [f"  {name:<11} {c.summary}" for name, c in COMMANDS.items()])


@dataclass(frozen=True)
class Command:
    """run does it and returns the exit code; words says what its positional arguments are."""

    run: Callable[[argparse.Namespace, list[str]], int]
    summary: str
    words: str
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None


class _Parser(argparse.ArgumentParser):
    """The options of one command. Flat: sub-parsers would forbid options between positional arguments."""

    def __init__(self, prog: str, command: Command) -> None:
        super().__init__(prog=prog, description=command.summary, allow_abbrev=False)
        self.add_argument("words", nargs="*", metavar="..", help=command.words)
        command.options(self)

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} ({self.prog} --help)")


def _config(args: argparse.Namespace, extra: Sequence[str] = ()) -> Config:
    from mm.config.schema import load_config

    words = [*args.words, *extra]
    files = [w for w in words if "=" not in w]
    if len(files) != 1:
        stray = next((f for f in files[1:] if not Path(f).suffix.startswith(".y")), None)
        hint = "" if stray is None else f"; an override is key=value, so {stray}=.."
        raise Refused(f"needed: one CONFIG file, given {' and '.join(files) or 'none'}{hint}")
    return load_config(Path(files[0]), [w for w in words if "=" in w])


def _world(args: argparse.Namespace, cfg: Config) -> int:
    """Ranks of the job: those that exist, or those to start."""
    if args.nproc is not None and args.nproc < 1:
        raise Refused(f"--nproc {args.nproc}; needed: at least 1")
    if not launch.launched():
        world = args.nproc or cfg.run.nproc
        if world > MOST_RANKS:
            raise Refused(f"{world} ranks (--nproc, run.nproc); needed: at most {MOST_RANKS}")
        return world
    if args.nproc not in (None, launch.world_size()):
        raise Refused(
            f"--nproc {args.nproc}, but {launch.world_size()} ranks were started; leave --nproc out"
        )
    launch.follow_launcher()
    return launch.world_size()


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, help="local ranks to start outside torchrun (default run.nproc)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start and write nothing")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="with --dry-run: draw the step, into DIR")


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    # From here on a request to end is heard, and ends the run well: importing takes seconds, a step too.
    with Stop(rank=launch.launched()) as stop:
        return _train_until(stop, args, argv)


def _train_until(stop: Stop, args: argparse.Namespace, argv: list[str]) -> int:
    if args.draw is not None and not args.dry_run:
        raise Refused(f"--draw {args.draw} without --dry-run; a step that ran is drawn by run.trace=STEP")
    cfg = _config(args)
    world = _world(args, cfg)
    from mm.commands.preflight import check_paths
    from mm.plan.blueprint import check_outline

    # Without torch, whose import takes seconds: a mistyped key need not wait for it.
    if not launch.launched():
        check_outline(cfg, world, lambda why: print(f"{why}; looking for what would work", flush=True))
    check_paths(cfg, write=not args.dry_run)
    if args.dry_run:
        from mm.commands.dry_run import dry_run

        print(dry_run(_check_train(cfg, world), args.draw))
        return 0
    if not launch.launched():
        _say_start(args, cfg, world, f"run folder {cfg.run.dir}")
        return launch.launch_local(world, argv, lambda: _check_train(cfg, world), stop)
    from mm.train.trainer import train

    train(_check_train(cfg, world), stop)
    return 0


def _check_train(cfg: Config, world: int) -> Blueprint:
    from mm.commands.preflight import check_start
    from mm.plan.blueprint import draw_up

    blueprint = draw_up(cfg, world)
    check_start(cfg)
    return blueprint


def _say_start(args: argparse.Namespace, cfg: Config, world: int, what: str) -> None:
    """One line at once: the ranks are silent for as long as they import torch."""
    config = next(w for w in args.words if "=" not in w)
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    print(f"{config}: starting {ranks} on this machine, {what}", flush=True)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layouts", nargs="+", action="extend", default=[], metavar="FILE", help="the first is the baseline")
    add("--nproc", type=int, help="local ranks to start outside torchrun (default run.nproc)")
    add("--steps", type=int, default=4, help="steps a round, of which the first warms up (default 4)")
    add("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    add("--json", type=Path, metavar="OUT", help="write the result here")


def _compare(args: argparse.Namespace, argv: list[str]) -> int:
    # --layouts takes every word that follows it; a layout file's name has no "=".
    layouts = [Path(w) for w in args.layouts if "=" not in w]
    if not layouts:
        raise Refused("needed: --layouts FILE [FILE ...], the first being the baseline")
    if not any("=" not in w for w in args.words):
        raise Refused("needed: one CONFIG file, before --layouts, which takes all the files that follow it")
    cfg = _config(args, [w for w in args.layouts if "=" in w])
    if args.steps < 2 or args.rounds < 1:
        raise Refused(
            f"--steps {args.steps} --rounds {args.rounds}; needed: at least 2 steps (the first warms up) "
            "and at least 1 round"
        )
    world = _world(args, cfg)
    from mm.commands.variants import check_variants, variants

    found = variants(cfg, layouts)
    if not launch.launched():
        check_variants(found, world)

    def runs() -> list[Run]:
        from mm.commands.compare import make_runs

        return make_runs(found, world)

    if not launch.launched():
        timed = f"{args.rounds} rounds of {args.steps} steps under each of {len(found)} layouts"
        _say_start(args, cfg, world, timed)
        return launch.launch_local(world, argv, runs)
    from mm.commands.compare import compare

    compare(cfg, runs(), steps=args.steps, rounds=args.rounds, json_out=args.json)
    return 0


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="prepare: folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="prepare: seed (default 0)")


def _data(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.words or [""]
    if verb == "prepare":
        if rest != ["digits"] or args.out is None:
            raise Refused(f"data prepare {' '.join(rest)}: needed: data prepare digits --out DIR")
        from mm.data.digits import prepare_digits

        try:
            shards = prepare_digits(args.out, args.seed)
        except ModuleNotFoundError as error:
            raise Refused(f"data prepare needs {error.name}: pip install -e '.[data]'") from error
        print(*shards, sep="\n")
        return 0
    if verb not in ("index", "inspect") or not rest:
        raise Refused("needed: data prepare digits --out DIR, data index SHARDS, or data inspect SHARDS")
    from mm.data.inspect import index_text, inspect_text

    print(index_text(rest, Path()) if verb == "index" else inspect_text(rest, Path()))
    return 0


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    kinds = ("float64", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=kinds, help="of exported tensors (default: as the checkpoint's)")


def _checkpoint(args: argparse.Namespace, argv: list[str]) -> int:
    verb, *rest = args.words or [""]
    if verb in ("import", "export") and len(rest) == 2:
        import torch

        from mm.checkpoint.weights import export_hf, import_hf

        source, out = Path(rest[0]), Path(rest[1])
        if verb == "import":
            print(import_hf(source, out))
        else:
            print(export_hf(source, out, None if args.dtype is None else getattr(torch, args.dtype)))
        return 0
    if verb not in ("inspect", "verify") or len(rest) != 1:
        raise Refused(
            "needed: checkpoint inspect PATH, checkpoint verify PATH, checkpoint import HF_FOLDER OUT, or "
            "checkpoint export PATH HF_FOLDER"
        )
    from mm.checkpoint.state import inspect_text, verify_text

    print(inspect_text(Path(rest[0])) if verb == "inspect" else verify_text(Path(rest[0])))
    return 0


def _doctor(args: argparse.Namespace, argv: list[str]) -> int:
    if args.words:
        raise Refused(f"doctor takes no arguments, given {' '.join(args.words)}")
    from mm.commands.doctor import examine

    text, healthy = examine()
    print(text)
    return 0 if healthy else 1


OVERRIDES = "CONFIG and key=value overrides, such as train.lr=0.001"
COMMANDS = {
    "train": Command(_train, "train CONFIG: run a job", OVERRIDES, _train_options),
    "compare": Command(
        _compare,
        "compare CONFIG --layouts FILE [FILE ..]: same model, data and seed under several layouts",
        OVERRIDES,
        _compare_options,
    ),
    "data": Command(
        _data,
        "data prepare digits --out DIR | index SHARDS | inspect SHARDS",
        "prepare digits, index SHARDS or inspect SHARDS; SHARDS are file names or patterns",
        _data_options,
    ),
    "checkpoint": Command(
        _checkpoint,
        "checkpoint inspect|verify PATH | import HF_FOLDER OUT | export PATH HF_FOLDER",
        "inspect PATH or verify PATH: a checkpoint's folder; import a Hugging Face folder of the Nemotron-H "
        "family to a checkpoint in OUT; export a checkpoint's language model to a new folder",
        _checkpoint_options,
    ),
    "doctor": Command(_doctor, "examine this machine: can the default job run?", "none"),
}
