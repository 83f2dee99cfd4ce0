"""`python -m tests.encoders_table [FAMILY ...] [--seeds N]`: what holds of each family of encoders.

Prints the table of docs/encoders.md, each cell of it run: random tiny models of each family, made, saved and
read by transformers. Ends with 0 where all cells hold.
"""

from __future__ import annotations

import sys

from tests.cells import Cell, Table, run
from tests.encoders.family_checks import (
    FOREIGN,
    MODELS,
    hold_exact,
    hold_generate,
    hold_layout,
    hold_round_trip,
)


def hold(cell: Cell) -> str:
    """All models of a family."""
    if cell.row == FOREIGN and cell.seed:
        return ""  # classes that are not built in differ by name, and their sizes are fixed
    said = set()
    for name in MODELS[cell.row]:
        folder = cell.folder / name
        folder.mkdir()
        if cell.column == "exact":
            hold_exact(name, cell.seed, folder)
        elif cell.column == "round trip":
            said.add(hold_round_trip(name, cell.seed, folder))
        elif cell.column == "generate":
            hold_generate(name, cell.seed, folder)
        else:
            said.add(hold_layout(name, cell.column, cell.seed, folder, cell.pool))
    return "/".join(sorted(said)) or "yes"


TABLE = Table(
    command="tests.encoders_table",
    heads=["`encoder`"],
    rows={family: [f"`{family}`"] for family in MODELS},
    seeds=3,
    hold=hold,
)


if __name__ == "__main__":
    sys.exit(run(TABLE, sys.argv[1:], __doc__))
