"""Read payloads from the shards, by the offsets of the index."""

from __future__ import annotations

import hashlib
import threading

from mm.data.sample import Part, Sample
from mm.data.storage import OpenFile, open_file


class BadSample(Exception):
    """A sample that cannot be read; it is skipped and replaced on all ranks alike."""

    def __init__(self, sample: Sample, why: str) -> None:
        super().__init__(f"sample {sample.key} of {sample.shard}: {why}")
        self.sample_id, self.key, self.shard, self.why = sample.id, sample.key, sample.shard, why


class ShardReader:
    """Reads payloads by offset. Threads may share it. Files stay open until close()."""

    def __init__(self) -> None:
        self._files: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, sample: Sample, part: Part) -> bytes:
        """The payload of one of `sample`'s parts, checked against the index; raises BadSample."""
        try:
            payload = self._file(part.shard).read_at(part.offset, part.size)
        except OSError as error:
            raise BadSample(sample, f"{part.name} of {part.shard} cannot be read: {error}") from error
        if len(payload) != part.size:
            raise BadSample(sample, f"{part.name} has {len(payload)} bytes, its index says {part.size}")
        if hashlib.sha256(payload).hexdigest() != part.sha256:
            hint = f"if {part.shard} was changed on purpose: python -m mm data index --again {part.shard}"
            raise BadSample(sample, f"{part.name} differs from its index (sha256); {hint}")
        return payload

    def _file(self, shard: str) -> OpenFile:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = open_file(shard)
            return self._files[shard]

    def close(self) -> None:
        """Close all files; they are opened again on demand."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
