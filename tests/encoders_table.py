"""`python -m tests.encoders_table [FAMILY ...] [--seeds N]`: what holds of each family of encoders.

Prints the table of docs/encoders.md, each cell of it run: random tiny models of each family, made, saved and
read by transformers. Ends with 0 where all cells hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.encoders.family_checks import (
    FOREIGN,
    MODELS,
    hold_exact,
    hold_generate,
    hold_layout,
    hold_round_trip,
)
from tests.pool import Pool

COLUMNS = ("exact", "round trip", "tp", "cp", "pp", "generate")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.encoders_table", description=__doc__)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(words)
    pool = Pool()
    print(f"| `encoder` | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (1 + len(COLUMNS)))
    good = True
    for family in given.family or MODELS:
        cells = [_cell(family, column, given.seeds, pool) for column in COLUMNS]
        good = good and "**no**" not in cells
        print(f"| `{family}` | {' | '.join(cells)} |", flush=True)
    pool.close()
    return 0 if good else 1


def _cell(family: str, column: str, seeds: int, pool: Pool) -> str:
    """What holds; what fails goes to stderr."""
    found = set()
    for name in MODELS[family]:
        # Classes that are not built in differ by name, and their sizes are fixed.
        for seed in range(1 if family == FOREIGN else seeds):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.add(_hold(name, column, seed, Path(folder), pool))
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    print(f"{name}, {column}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
                    return "**no**"
    return "/".join(sorted(found))


def _hold(name: str, column: str, seed: int, folder: Path, pool: Pool) -> str:
    """What a cell says; raises where that does not hold."""
    if column == "round trip":
        return hold_round_trip(name, seed, folder)
    if column == "exact":
        hold_exact(name, seed, folder)
    elif column == "generate":
        hold_generate(name, seed, folder)
    else:
        return hold_layout(name, column, seed, folder, pool)
    return "yes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
