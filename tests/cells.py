"""A table of which each cell is run: what holds of each family, over random tiny models of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pool import Pool

COLUMNS = ("exact", "round trip", "tp", "cp", "pp", "generate")


@dataclass(frozen=True)
class Cell:
    """One run of a cell. folder: an empty one."""

    row: str
    column: str
    seed: int
    folder: Path
    pool: Pool


@dataclass(frozen=True)
class Table:
    """command: what prints it. heads: of the columns before those of cells. rows: what is in these, by row.
    seeds: of a cell by default. hold: runs a cell and returns what it says, "" for nothing more; raises where
    it does not hold."""

    command: str
    heads: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    seeds: int
    hold: Callable[[Cell], str]


def run(table: Table, words: Sequence[str], about: str | None) -> int:
    """Print the table, or the rows named in `words`; 0 where all cells hold. What fails goes to stderr."""
    parser = argparse.ArgumentParser(prog=f"python -m {table.command}", description=about)
    parser.add_argument("row", nargs="*")
    parser.add_argument("--seeds", type=int, default=table.seeds)
    given = parser.parse_args(words)
    pool = Pool()
    _print([*table.heads, *COLUMNS])
    print("|" + "---|" * (len(table.heads) + len(COLUMNS)))
    good = True
    for row in given.row or table.rows:
        said = [_said(table, row, column, given.seeds, pool) for column in COLUMNS]
        good = good and None not in said
        _print([*table.rows[row], *("**no**" if cell is None else cell for cell in said)])
    pool.close()
    return 0 if good else 1


def _print(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _said(table: Table, row: str, column: str, seeds: int, pool: Pool) -> str | None:
    """What a cell says; None where it does not hold."""
    found = set()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found.add(table.hold(Cell(row, column, seed, Path(folder), pool)))
            except BaseException as error:  # pytest's failures are no Exceptions
                if isinstance(error, KeyboardInterrupt):
                    raise
                print(f"{row}, {column}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
                return None
    return "/".join(sorted(found - {""}))
