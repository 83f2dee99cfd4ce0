"""What a failed job leaves in its run's folder: stacks in faults/rank-R.txt, last actions in *.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.errors import PolyrankError
from mm.faults.stacks import ask, end, state_of
from mm.faults.watch import Watch

NAME = "faults"


def save(run_dir: Path, rank: int, text: str, actions: Sequence[Any]) -> str:
    """Add a text to a rank's, and write its last actions; returns the folder's name, "" where nothing can be
    written."""
    folder = run_dir / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _append(folder, rank, text)
        (folder / f"rank-{rank}.json").write_text(json.dumps(list(actions), indent=1))
    except OSError:  # a full disk must not hide why the job failed
        return ""
    return str(folder)


def _append(folder: Path, rank: int, text: str) -> None:
    with (folder / f"rank-{rank}.txt").open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text.rstrip()}\n\n")


def end_rank(watch: Watch, rank: int, run_dir: Path) -> None:
    """End a rank that hangs, with its stacks: where this rank is the first other one on its machine."""
    about, mine = watch.about(rank), watch.about(watch.rank)
    if about is None or mine is None or about.host != mine.host:
        return
    if next(others_here(watch, rank), None) != watch.rank:
        return
    text = ask(about.pid, about.stacks)
    if text:
        with (run_dir / NAME / f"rank-{rank}.txt").open("a") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}, asked by rank {watch.rank}\n{text.rstrip()}\n\n"
            )
    end(about.pid)


def others_here(watch: Watch, rank: int) -> Iterator[int]:
    """The living ranks on this machine but one, in order."""
    host = watch.abouts[watch.rank].host
    for r in range(watch.world):
        about = watch.about(r)
        if r != rank and about is not None and about.host == host and state_of(about.pid) not in ("", "Z"):
            yield r


def message(error: BaseException, rank: int, where: str, inside: bool) -> str:
    """What one rank tells of its error. inside: it has left an action, which other ranks need not have."""
    text = "; ".join([str(error), *getattr(error, "__notes__", ())])
    known, name = isinstance(error, PolyrankError), type(error).__name__
    if known and not inside:
        return f"{name}: {text}"
    return f"{name}: rank {rank}, {where}: {text}" if known else f"rank {rank}: {where}: {name}: {text}"
