"""`report RUN`: the page of a run, from its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from mm.commands.command import Command, check_writable
from mm.errors import Refused


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="OUT", help="file to write (default report.html in RUN)")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    if len(args.positional) != 1:
        raise Refused(f"report {' '.join(args.positional)}: needed: report RUN, the folder of one run")
    check_writable(out=args.out)
    from mm.pages.run_page import write_report

    path = write_report(Path(args.positional[0]), args.out)
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


COMMAND = Command(
    _run,
    "report RUN: the page of a run that has ended or is going on",
    "RUN, the folder of a run: its run.dir",
    _options,
)
