"""The command line: `python -m mm COMMAND ...`. Options and key=value overrides come in any order.

Exit codes: 0 done; 2 refused (usage, config, layout); 3 data; 4 checkpoint; 5 numerics; 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mm.commands import checkpoint, compare, data, doctor, evaluate, generate, plan, report, train
from mm.commands.command import Command
from mm.data.remote.urls import scrub
from mm.errors import PolyrankError, Refused, Told
from mm.ranks import launch

COMMANDS = {
    "train": train.COMMAND,
    "compare": compare.COMMAND,
    "plan": plan.COMMAND,
    "data": data.COMMAND,
    "checkpoint": checkpoint.COMMAND,
    "generate": generate.COMMAND,
    "eval": evaluate.COMMAND,
    "report": report.COMMAND,
    "doctor": doctor.COMMAND,
}


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Where a job fails, one rank prints why, in one message."""
    try:
        return _run(list(argv))
    except SystemExit:
        raise
    except Told as error:
        return error.exit_code
    except BaseException as error:  # torch's CheckpointException is no Exception
        if launch.reports(error):
            _explain(error)
        return error.exit_code if isinstance(error, PolyrankError) else 1


def _explain(error: BaseException) -> None:
    """Print an error: as a message where the user can act on it, else with its traceback."""
    if isinstance(error, PolyrankError):
        message = f"{type(error).__name__}: {error}"
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, ModuleNotFoundError):
        message = (
            f"{error.name} is not installed for {sys.executable}; needed: pip install -e . with it, or "
            "the Python of `make train`, .venv/bin/python"
        )
    elif isinstance(error, OSError) and error.filename is not None:
        # An error that names no file is the network's: its traceback is needed.
        message = f"{error.filename}: {error.strerror}"
    else:
        if launch.launched():
            print(f"rank {os.environ['RANK']} failed:", file=sys.stderr)
        traceback.print_exception(error)
        return
    print(scrub(message), file=sys.stderr, flush=True)  # a URL of a config may have a password


def _run(argv: list[str]) -> int:
    named = next((i for i, argument in enumerate(argv) if argument in COMMANDS), None)
    if named is None:
        if "-h" in argv or "--help" in argv:
            print(overview())
            return 0
        given = next((argument for argument in argv if not argument.startswith("-")), None)
        near = difflib.get_close_matches(given or "", COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise Refused(f"unknown command {given}; {hint}" if given else f"no command; {hint}")
    command = COMMANDS[argv[named]]
    parser = _Parser(f"python -m mm {argv[named]}", command)
    args = parser.parse_intermixed_args(argv[:named] + argv[named + 1 :])
    return command.run(args, argv)


def overview() -> str:
    """The help of the whole command line."""
    lines = [(__doc__ or "").strip(), "", "commands (each has --help):"]
    return "\n".join(lines + [f"  {name:<11} {c.summary}" for name, c in COMMANDS.items()])


class _Parser(argparse.ArgumentParser):
    """The options of one command. Flat: sub-parsers would forbid options between positional arguments."""

    def __init__(self, prog: str, command: Command) -> None:
        super().__init__(prog=prog, description=command.summary, allow_abbrev=False)
        self.add_argument("positional", nargs="*", metavar="..", help=command.positional)
        command.options(self)

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} ({self.prog} --help)")
