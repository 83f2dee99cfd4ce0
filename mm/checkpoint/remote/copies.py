"""The checkpoints of a run's folder, copied to its target: which, in which order, and which go there."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mm.checkpoint.kept import metric_of, why_kept
from mm.checkpoint.remote.index import FILE, INDEX, MOST_BYTES, Entry, RemoteIndex, is_name, step_of
from mm.checkpoint.remote.note import Note, write_note
from mm.config.schema import CheckpointConfig
from mm.data.remote.folder import Folder, Pace
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.checkpoint import manifest

FILES = 4  # of one checkpoint that are copied at once
LOOKS = 5  # at an index that is replaced meanwhile


def read_index(folder: Folder) -> RemoteIndex | None:
    """The index of a target, None where it has none. Raises CheckpointError where it is damaged."""
    inside = folder.within(INDEX)
    for _ in range(LOOKS):
        names = sorted(name for name in inside.sizes() if FILE.fullmatch(name))
        if not names:
            return None
        try:
            data = inside.read(names[-1], MOST_BYTES)
        except FileNotFoundError:  # newer ones have been written since, and this one has gone
            continue
        index = RemoteIndex.parse(data, inside.name(names[-1]))
        return replace(index, file=names[-1], older=tuple(names[:-1]))
    raise OSError(f"{inside.url} changes faster than it can be read")


def write_index(folder: Folder, index: RemoteIndex) -> RemoteIndex:
    """Write an index that follows the one that was read: from then on it is what readers go by."""
    inside, new = folder.within(INDEX), replace(index, file=index.next_file, older=(index.file,))
    inside.write(new.file, index.written())
    inside.remove(index.older)
    return replace(new, older=tuple(filter(None, new.older)))


@dataclass(frozen=True)
class Copies:
    """Copies from a run's folder to its target.

    run: that the target belongs to. session: of this start of the run; first: the step that it began after.
    """

    folder: Folder
    directory: Path
    rules: CheckpointConfig
    run: str
    session: str
    first: int
    pace: Pace = field(default_factory=Pace)

    def copy_one(self) -> str | None:
        """Copy the checkpoint whose turn it is; returns its name, or None where all is copied.

        Raises OSError, DataError, BadCheckpoint or CheckpointError where it cannot be. The target has then
        what it had before.
        """
        found = read_index(self.folder) or RemoteIndex(self.run)
        if found.run != self.run:
            raise CheckpointError(
                f"{self.folder.url} belongs to another run now; needed: a checkpoint.remote.url for each"
            )
        index = self._followed(found)
        name = self._due(index)
        if name is not None:
            self._copy(index, name)
        elif index != found:
            self._give_up(index)
        return name

    def _followed(self, index: RemoteIndex) -> RemoteIndex:
        """Without what an earlier start of the run has copied of steps that this one does not follow."""
        others = [
            n for n, e in index.checkpoints.items() if step_of(n) > self.first and e.session != self.session
        ]
        return _without(index, others)

    def _due(self, index: RemoteIndex) -> str | None:
        """The newest that is not there; else one that the rules keep for more than being among the last."""
        names = [p.name for p in store.published(self.directory) if is_name(p.name)]
        missing = [name for name in names if name not in index.checkpoints]
        if not missing or missing[-1] == names[-1]:
            return missing[-1] if missing else None
        known = {n: e.metrics for n, e in index.checkpoints.items()}
        why = self._why({**known, **{name: self._metrics(name) for name in missing}})
        return next((n for n in reversed(missing) if set(why[n]) - {"last"}), None)

    def _why(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
        """Why each checkpoint stays in the target. metrics: of each."""
        rules, by_step = self.rules, {step_of(name): name for name in metrics}
        by = rules.keep_best or ""
        best = {s: metrics[n][by] for s, n in by_step.items() if by in metrics[n]}
        keep = rules.keep if rules.remote.keep is None else rules.remote.keep
        return {by_step[s]: why for s, why in why_kept([*by_step], best, keep, rules.keep_every).items()}

    def _metrics(self, name: str) -> dict[str, float]:
        """The metric of a checkpoint of the folder that it may be kept for."""
        if self.rules.keep_best is None:
            return {}
        value = metric_of(store.read_state(self.directory / name), self.rules.keep_best)
        return {} if value is None else {self.rules.keep_best: value}

    def _copy(self, index: RemoteIndex, name: str) -> None:
        path = self.directory / name
        write_note(self.directory, Note(self.run, name))  # from here on no save removes it
        try:
            listed, metrics = manifest.entries(path), self._metrics(name)
            text = (path / store.MANIFEST).read_bytes()
            out = self.folder.within(f"{name}.{uuid.uuid4().hex[:8]}")
            home = out.url.rpartition("/")[2]
            index = write_index(self.folder, replace(index, unfinished=(*index.unfinished, home)))
            left = self._clear(n for n in index.unfinished if n != home)
            self._upload(path, listed, out)
            out.write(store.MANIFEST, text)
        finally:
            write_note(self.directory, Note(self.run))
        total = len(text) + sum(entry.bytes for entry in listed.values())
        new = Entry(home, hashlib.sha256(text).hexdigest(), total, self.session, metrics)
        index = replace(index, checkpoints={**index.checkpoints, name: new}, unfinished=tuple(left))
        why = self._why({n: e.metrics for n, e in index.checkpoints.items()})
        self._give_up(_without(index, [n for n in index.checkpoints if not why[n] and n != name]))

    def _give_up(self, index: RemoteIndex) -> None:
        """Write an index, and then remove the objects of what is unfinished in it. Raises OSError where that
        is not allowed: what the index names is there all the same."""
        index = write_index(self.folder, index)
        left = self._clear(index.unfinished)
        if len(left) < len(index.unfinished):
            write_index(self.folder, replace(index, unfinished=tuple(left)))
        for error in left.values():
            raise error

    def _clear(self, names: Iterable[str]) -> dict[str, OSError]:
        """Remove the objects of some folders; returns those whose objects cannot be removed."""
        left = dict[str, OSError]()
        for name in names:
            try:
                self.folder.within(name).clear()
            except OSError as error:  # to write may be allowed, and not to remove
                left[name] = error
        return left

    def _upload(self, path: Path, listed: Mapping[str, manifest.Entry], out: Folder) -> None:
        with ThreadPoolExecutor(FILES) as pool:
            try:
                for _ in pool.map(partial(self._upload_file, path, listed, out), sorted(listed)):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _upload_file(self, path: Path, listed: Mapping[str, manifest.Entry], out: Folder, name: str) -> None:
        read = out.upload(name, path / name, self.pace)
        if tuple(read) != tuple(listed[name]):
            raise store.BadCheckpoint(f"{path / name} is damaged: it differs from {store.MANIFEST}")


def _without(index: RemoteIndex, names: Collection[str]) -> RemoteIndex:
    """An index in which some checkpoints are unfinished."""
    left = {n: e for n, e in index.checkpoints.items() if n not in names}
    gone = tuple(index.checkpoints[n].folder for n in names)
    return replace(index, checkpoints=left, unfinished=(*index.unfinished, *gone))
