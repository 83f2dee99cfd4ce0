"""`python -m tests.families [NAME ...] [--seeds N]`: what holds of each family of language models.

NAME: a model_type; all by default. Prints the table of docs/families.md, each cell of it run: random tiny
models of each family, made, saved and read by transformers. Ends with 0 where all cells hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from llm.hf import FAMILIES, export_checkpoint
from parallel import checkpoint as checkpoint
from tests.cells import Cell, Table, run
from tests.llm.families import RANDOM
from tests.llm.family_checks import (
    cases,
    even_folder,
    hold_exact,
    hold_generate,
    hold_round_trip,
    hold_stages,
)
from tests.llm.folders import differing, into_layout, read_all
from tests.llm.test_whole import compare, run_rank
from tests.pool import Pool


def hold(cell: Cell) -> str:
    name, seed, folder = cell.row, cell.seed, cell.folder
    if cell.column == "exact":
        hold_exact(name, seed, folder / "64", torch.float64, 1e-10)
        hold_exact(name, seed, folder / "32", torch.float32, 1e-5)
    elif cell.column == "round trip":
        hold_round_trip(name, seed, folder)
    elif cell.column == "generate":
        hold_generate(name, seed, folder)
    elif seed == 0:
        hold_layout(name, cell.column, folder, cell.pool)
    return "yes"


def hold_layout(name: str, column: str, folder: Path, pool: Pool) -> None:
    """Two ranks read what they hold and write the same bytes again; loss and gradients are one process's."""
    cfg = even_folder(name, 0, folder / "in")
    if column == "pp":
        hold_stages(cfg, folder / "in")
    else:
        pool.run(2, into_layout, str(folder / "in"), cfg, {column: 2}, str(folder / "job"))
        (saved,) = checkpoint.published(folder / "job")
        export_checkpoint(saved, folder / "out", cfg)
        assert not differing(read_all(folder / "out"), read_all(folder / "in"))
    case = cases(cfg)[column]
    compare(case, [r[0] for r in pool.run(2, run_rank, [case])])


TABLE = Table(
    command="tests.families",
    heads=["family", "`model_type`"],
    rows={name: [FAMILIES[name].title, f"`{name}`"] for name in RANDOM},
    seeds=6,
    hold=hold,
)


if __name__ == "__main__":
    sys.exit(run(TABLE, sys.argv[1:], __doc__))
