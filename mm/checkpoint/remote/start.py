"""A run's target at its start: a newer checkpoint is fetched from it, and it is made the run's own."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mm.checkpoint.remote.copies import read_index, write_index
from mm.checkpoint.remote.fetch import fetch
from mm.checkpoint.remote.index import RemoteIndex, step_of
from mm.checkpoint.remote.note import Note, read_note, write_note
from mm.checkpoint.resume import Heartbeat, find, set_aside
from mm.config.schema import Config
from mm.data.remote.folder import Folder
from mm.errors import CheckpointError, DataError
from mm.ranks.agree import of_the_lead
from mm.ranks.launch import RankInfo
from parallel import checkpoint as store

T = TypeVar("T")
ANEW = "to begin anew: checkpoint.resume=none, and a checkpoint.remote.url without checkpoints"


def find_or_fetch(cfg: Config, directory: Path, rank: RankInfo, known: Mapping[Path, str]) -> Path | None:
    """resume.find(), after the newest sound checkpoint of checkpoint.remote has been brought to `directory`,
    where that is newer than what is there; every rank calls this. Raises CheckpointError as find() does."""
    failed: CheckpointError | None = None
    path: Path | None = None
    try:
        path = find(cfg, directory, rank, known)
    except CheckpointError as error:
        failed = error
    if cfg.checkpoint.remote.url is not None and cfg.checkpoint.resume == "auto":
        there = path
        if _led(rank, "fetch", lambda: fetch_newer(cfg, directory, there, known)):
            return find(cfg, directory, rank, known)
    if failed is not None:
        raise failed
    return path


def fetch_newer(cfg: Config, directory: Path, path: Path | None, known: Mapping[Path, str]) -> bool:
    """Bring the newest sound checkpoint of the target to `directory`, where it is of a later step than
    `path`; returns whether there was one. known: what is wrong with checkpoints, by their paths.

    Raises CheckpointError where a later one cannot be had just now, or where nothing is known of the target
    and there is no `path`: going on without it would lose steps.
    """
    folder, wrong = _folder(cfg), list[str]()
    try:
        index = read_index(folder)
    except (OSError, DataError, CheckpointError) as error:
        if path is None:
            raise CheckpointError(
                f"whether there is a checkpoint to resume from is not known: {error}; {ANEW}"
            ) from error
        _warn(f"{error}; whether {folder.url} has a newer checkpoint than {path} is not known")
        return False
    if index is None or not _is_ours(directory, index):
        return False
    for name in index.newest_first:
        if path is not None and step_of(name) <= store.step_of(path):
            break
        if directory / name in known:
            continue
        try:
            _bring(folder, name, index, directory)
        except (store.BadCheckpoint, FileNotFoundError) as error:
            wrong.append(f"{folder.name(name)} is damaged: {error}")
            continue
        except (OSError, DataError) as error:
            raise CheckpointError(
                f"{folder.name(name)} cannot be fetched: {error}; needed: the store, or another checkpoint "
                f"by checkpoint.resume=PATH; {ANEW}"
            ) from error
        if wrong:
            _warn(f"{'; '.join(wrong)}; using {folder.name(name)}")
        return True
    if wrong and path is None:
        raise CheckpointError(f"cannot resume: {'; '.join(wrong)}; {ANEW}")
    if wrong:
        _warn("; ".join(wrong))
    return False


def own_target(cfg: Config, directory: Path, rank: RankInfo, resumed: Path | None) -> str:
    """Make sure that the target is this run's, before anything is copied there or set aside; every rank calls
    this and gets the run's name in the target. resumed: what the run goes on from.

    Raises CheckpointError where the target has checkpoints that the run does not go on from, or cannot be
    written by a run that begins.
    """
    own = resumed is not None and resumed.resolve().parent == directory.resolve()
    return _led(rank, "own", lambda: _own(cfg, directory, own))


def _own(cfg: Config, directory: Path, own: bool) -> str:
    folder, note = _folder(cfg), read_note(directory) if own else None
    run = note.run if note is not None else uuid.uuid4().hex
    try:
        index = read_index(folder)
        if index is None:
            strays = sorted({name.split("/")[0] for name in folder.sizes() if name.startswith("step-")})
            if strays:
                raise CheckpointError(f"{folder.url} has {strays[0]}, which no list of a run names; {ANEW}")
        if index is None or (index.run != run and not index.checkpoints):
            write_index(folder, RemoteIndex(run))
        elif index.run != run:
            raise CheckpointError(
                f"{folder.url} has checkpoints that this run does not go on from (the newest: "
                f"{index.newest_first[0]}); needed: another checkpoint.remote.url, or checkpoint.resume=auto "
                "in an empty run.dir, which fetches and goes on from them"
            )
    except (OSError, DataError) as error:
        if not own:
            raise CheckpointError(f"checkpoint.remote.url: {error}") from error
        _warn(f"{error}; checkpoints are copied once {folder.url} can be reached")
    write_note(directory, Note(run))
    return run


def _bring(folder: Folder, name: str, index: RemoteIndex, directory: Path) -> None:
    entry = index.checkpoints[name]
    print(f"fetching {folder.name(name)} ({entry.bytes / 2**20:.1f} MiB)", flush=True)
    if (directory / name).exists():  # damaged: find() has passed it over
        set_aside(directory / name)
    fetch(folder, name, entry, directory)
    write_note(directory, Note(index.run))


def _is_ours(directory: Path, index: RemoteIndex) -> bool:
    """Whether the target's checkpoints are of the run in `directory`, or of one that had another folder."""
    note = read_note(directory)
    return note.run == index.run if note is not None else not store.published(directory)


def _folder(cfg: Config) -> Folder:
    assert cfg.checkpoint.remote.url is not None
    return Folder.of(cfg.checkpoint.remote.url, cfg.checkpoint.remote.timeout_s)


def _led(rank: RankInfo, key: str, work: Callable[[], T]) -> T:
    """work() of rank 0, on every rank. However long it takes, the others wait: its requests have limits."""
    if rank.world == 1:
        return work()
    heartbeat = Heartbeat(rank, f"remote/{key}")
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work) if rank.rank == 0 else None
        while done is not None and not done.done():
            heartbeat.count()
            time.sleep(0.02)
        heartbeat.wait_for_all()
        return of_the_lead(rank, lambda: _of(done))


def _of(done: Future[T] | None) -> T:
    assert done is not None, "rank 0 has done it"
    return done.result()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
