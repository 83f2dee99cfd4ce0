"""`python -m tests.families [NAME ...] [--seeds N]`: what holds of each family of language models.

NAME: a model_type; all by default. Prints the table of docs/families.md, each cell of it run: random tiny
models of each family, made, saved and read by transformers. Ends with 0 where all cells hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llm.hf import FAMILIES, export_checkpoint
from parallel import checkpoint as checkpoint
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

COLUMNS = ("exact", "round trip", "tp", "cp", "pp", "generate")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--seeds", type=int, default=6)
    given = parser.parse_args(words)
    pool = Pool()
    print(f"| family | `model_type` | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    good = True
    for name in given.name or RANDOM:
        cells = [_cell(name, column, given.seeds, pool) for column in COLUMNS]
        good = good and all(cells)
        said = " | ".join("yes" if cell else "**no**" for cell in cells)
        print(f"| {FAMILIES[name].title} | `{name}` | {said} |", flush=True)
    pool.close()
    return 0 if good else 1


def _cell(name: str, column: str, seeds: int, pool: Pool) -> bool:
    """Whether a cell holds; what fails goes to stderr."""

    def exact(folder: Path, seed: int) -> None:
        hold_exact(name, seed, folder / "64", torch.float64, 1e-10)
        hold_exact(name, seed, folder / "32", torch.float32, 1e-5)

    def layout(folder: Path, seed: int) -> None:
        if seed == 0:
            hold_layout(name, column, folder, pool)

    run: Callable[[Path, int], None] = {
        "exact": exact,
        "round trip": lambda folder, seed: hold_round_trip(name, seed, folder),
        "generate": lambda folder, seed: hold_generate(name, seed, folder),
    }.get(column, layout)
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(Path(folder), seed)
            except Exception:
                print(f"{name}, {column}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
                return False
    return True


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
