"""Where a run resumes, agreed by all ranks, and what happens to the checkpoints that it does not follow.

run.json in the run's folder names the launch that began there last, and what it began from. A launch that
torchrun starts again finds itself in it. It goes on from its own newest checkpoint, whatever
checkpoint.resume says: that key is for a launch's beginning.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from mm.checkpoint.alone import RUN
from mm.checkpoint.room import writing_to
from mm.checkpoint.state import candidates
from mm.config.schema import Config
from mm.errors import CheckpointError, PolyrankError
from mm.ranks.agree import of_the_lead
from mm.ranks.launch import RankInfo, restarted
from parallel import checkpoint as store

HEARTBEAT_S = 1.0  # least time between two heartbeats of a rank
NOTHING_KNOWN: Mapping[Path, str] = MappingProxyType({})


def find(
    cfg: Config, directory: Path, rank: RankInfo | None = None, known: Mapping[Path, str] = NOTHING_KNOWN
) -> Path | None:
    """The checkpoint to resume from: the newest undamaged one of candidates(), None where there are none.

    Every rank of the job calls this and gets the same answer. rank: None in a process without a job. known:
    what is wrong with checkpoints beside their files, which are then passed over.
    Raises CheckpointError where all candidates are damaged: otherwise a run would begin anew over them.
    """

    def choose() -> list[Path]:
        own = store.published(directory)[::-1] if began_here(directory, rank) else []
        return own or candidates(cfg, directory)

    wrong: list[str] = []
    for path in of_the_lead(rank, choose):
        if path in known:
            wrong.append(known[path])
            continue
        found = verify(path, rank)
        if not found:
            if wrong and (rank is None or rank.rank == 0):
                print(f"warning: {'; '.join(wrong)}; using {path}", file=sys.stderr, flush=True)
            return path
        wrong.append(f"{path} is damaged: {', '.join(found)}")
    if wrong:
        hint = "; to begin anew: checkpoint.resume=none" if cfg.checkpoint.resume == "auto" else ""
        raise CheckpointError(f"cannot resume: {'; '.join(wrong)}{hint}")
    return None


def last_of(directory: Path, rank: RankInfo | None = None) -> Path | None:
    """The newest checkpoint of a folder, undamaged or not; every rank calls this and gets the same answer."""
    found = of_the_lead(rank, lambda: store.published(directory)[-1:])
    return found[0] if found else None


def verify(path: Path, rank: RankInfo | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, on every rank: each reads its share of them.

    However long that takes, ranks that are done wait as long as some other rank's heartbeat goes on.
    """
    if rank is None or rank.world == 1:
        return store.verify(path)
    heartbeat = Heartbeat(rank, f"verify/{path}")
    mine = store.verify(path, rank.rank, rank.world, heartbeat=heartbeat.count)
    heartbeat.wait_for_all()
    parts: list[Any] = [None] * rank.world
    dist.all_gather_object(parts, mine)
    return [line for part in parts for line in part]


class Heartbeat:
    """Heartbeats in the job's store, for waits without a bound: they last as long as some rank works on."""

    def __init__(self, rank: RankInfo, key: str) -> None:
        self._rank, self._key, self._last = rank, key, time.monotonic()

    def count(self) -> None:
        """Count a heartbeat of this rank, at most one every HEARTBEAT_S."""
        if self._rank.store is not None and time.monotonic() - self._last > HEARTBEAT_S:
            self._last = time.monotonic()
            self._rank.store.add(f"{self._key}/beat", 1)

    def wait_for_all(self) -> None:
        """Wait until every rank has called this.

        Raises PolyrankError when no rank's heartbeat has been counted for run.timeout_s.
        """
        store = self._rank.store
        if store is None:
            return
        # The count only grows, because the same checkpoint may be verified again.
        target = -(-store.add(f"{self._key}/done", 1) // self._rank.world) * self._rank.world
        seen, since = -1, time.monotonic()
        while store.add(f"{self._key}/done", 0) < target:
            now = store.add(f"{self._key}/beat", 0) + store.add(f"{self._key}/done", 0)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._rank.timeout_s:
                raise PolyrankError(
                    f"some ranks do not go on with {self._key} for {self._rank.timeout_s:g} s (run.timeout_s)"
                )
            time.sleep(0.05)


def begin(directory: Path, rank: RankInfo, resumed: Path | None, first: int) -> list[Path]:
    """Begin in `directory`, which this launch has claimed, once all ranks have read what they start from.

    Every rank calls this. Checkpoints that the run does not follow are renamed to replaced-step-*: those
    after step `first`, or all where it did not resume from one of this folder. Otherwise a resume would take
    them for the run's own, and a save would remove the run's own for them. Returns their new names.
    Raises CheckpointError on all ranks where the folder cannot be written to.
    """

    def write() -> list[Path]:
        with writing_to(directory):
            return write_down()

    def write_down() -> list[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        own = resumed is not None and resumed.resolve().parent == directory.resolve()
        moved = [set_aside(p) for p in store.published(directory) if not own or store.step_of(p) > first]
        note = {
            "launch": rank.launch,
            "run_id": _run_id(),
            "from": None if resumed is None else str(resumed),
            "first": first,
        }
        store.remove_leftovers(directory)  # of a launch that was killed as it wrote
        store.point(directory)
        store.write_whole(directory / RUN, json.dumps(note, indent=1))
        return moved

    if rank.world > 1:
        dist.barrier()
    return of_the_lead(rank, write)


def began_here(directory: Path, rank: RankInfo | None) -> bool:
    """Whether this launch has begun in `directory` before, and torchrun has started its ranks again."""
    if rank is None or rank.rank != 0:
        return False
    try:
        note = json.loads((directory / RUN).read_text())
        launch, run_id = note["launch"], note["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if rank.relaunched:
        return bool(launch == rank.launch)
    # Where the launch's store was lost with its machine, an id given to torchrun identifies the launch.
    return restarted() and _run_id() is not None and run_id == _run_id()


def _run_id() -> str | None:
    """The id that the user, or --standalone, gave this launch of torchrun."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if given in ("", "none") else given


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that it is no longer taken for the run's; returns its new name."""
    name, n = path.with_name(f"replaced-{path.name}"), 1
    while name.exists():
        n += 1
        name = path.with_name(f"replaced-{path.name}.{n}")
    path.rename(name)
    return name
