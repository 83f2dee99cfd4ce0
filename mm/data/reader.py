"""Read payloads from the shards, by the offsets of the index."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable

from mm.data.remote.urls import is_remote
from mm.data.sample import Part, Sample
from mm.data.storage import LOCAL, OpenFile, Storage


class BadSample(Exception):
    """A sample that cannot be read; it is skipped and replaced on all ranks alike."""

    def __init__(self, sample: Sample, why: str) -> None:
        super().__init__(f"sample {sample.name} of {sample.shard}: {why}")
        self.sample_id, self.key, self.shard, self.why = sample.id, sample.key, sample.shard, why
        self.portion = "" if sample.portion is None else str(sample.portion)


class ShardReader:
    """Reads payloads by offset. Threads may share it. Files stay open until close()."""

    def __init__(self, storage: Storage = LOCAL) -> None:
        self._storage = storage
        self._ahead: dict[tuple[str, int, int], bytes] = {}
        self._files: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, sample: Sample, part: Part) -> bytes:
        """The payload of one of `sample`'s parts, checked against the index; raises BadSample."""
        try:
            payload = self._ahead.pop((part.shard, part.offset, part.size), None)
            if payload is None:
                payload = self._file(part.shard).read_at(part.offset, part.size)
        except OSError as error:
            raise BadSample(sample, f"{part.name} of {part.shard} cannot be read: {error}") from error
        if len(payload) != part.size:
            raise BadSample(sample, f"{part.name} has {len(payload)} bytes, its index says {part.size}")
        if hashlib.sha256(payload).hexdigest() != part.sha256:
            hint = f"if {part.shard} was changed on purpose: python -m mm data index --again {part.shard}"
            raise BadSample(sample, f"{part.name} differs from its index (sha256); {hint}")
        return payload

    @property
    def patience_s(self) -> float:
        """The longest time that a store may take until a read is given up; 0 on this machine."""
        return self._storage.patience_s

    def ahead(self, parts: Iterable[Part]) -> None:
        """Read payloads together that read() is asked for next; only remote ones, where it saves time.

        What cannot be read is left to read(), which says so. Those of an earlier call are forgotten.
        """
        wanted = [(p.shard, p.offset, p.size) for p in parts if is_remote(p.shard)]
        self._ahead = self._storage.read_many(wanted)

    def _file(self, shard: str) -> OpenFile:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = self._storage.open_file(shard)
            return self._files[shard]

    def close(self) -> None:
        """Close all files; they are opened again on demand."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
