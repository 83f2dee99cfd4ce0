"""The index of a target: which checkpoints are whole there. What it does not name is not read.

    {"run": "5f0c..", "checkpoints": {"step-00000120": {"folder": "step-00000120.1b3c5d7e", "manifest": SUM,
     "bytes": 9, "session": "81ba..", "metrics": {"loss": 1.5}}}, "unfinished": ["step-00000140.90ab12cd"]}

It is written before a copy begins (its folder under `unfinished`), and when all of it is there, so a reader
never takes half a copy. Each entry has the sum of its manifest, and that has the sums of the files.

No object is ever written twice: each copy has a folder of its own, and each index the next name in index/, of
which the last counts. A store may carry out a request long after it was given up and sent again, so an older
index could come over a newer one, and a removal over what was written since.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.errors import CheckpointError

INDEX = "index"  # folder of the indexes
MOST_BYTES = 64 << 20  # of one
FILE = re.compile(r"[0-9]{15}\.json")
FOLDER = re.compile(r"step-[0-9]{8,18}\.[0-9a-f]{8}")
NAME = re.compile(r"step-[0-9]{8,18}")
WRONG = (TypeError, LookupError, AttributeError, ArithmeticError)  # what other data than an index raise
SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A checkpoint that is whole in a target. folder: where. manifest: sha256 of its manifest.json. bytes: of
    all its files. session: which start of the run has copied it. metrics: numbers that it may be kept for."""

    folder: str
    manifest: str
    bytes: int
    session: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RemoteIndex:
    """run: whose target it is. checkpoints: by name. unfinished: folders of copies that were begun, and of
    checkpoints that went; they are removed before the next copy. file: of this index; older: of others."""

    run: str
    checkpoints: Mapping[str, Entry] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    file: str = field(default="", compare=False)
    older: tuple[str, ...] = field(default=(), compare=False)

    @property
    def next_file(self) -> str:
        """The name of an index that follows: after this one, and after all that were begun before now."""
        last = int(self.file.removesuffix(".json") or 0)
        return f"{max(last + 1, int(time.time() * 1000)):015d}.json"

    @property
    def newest_first(self) -> list[str]:
        """The names of the checkpoints."""
        return sorted(self.checkpoints, key=step_of, reverse=True)

    def written(self) -> bytes:
        """As the object has it."""
        entries = {
            name: {**vars(entry), "metrics": dict(entry.metrics)} for name, entry in self.checkpoints.items()
        }
        whole = {"run": self.run, "checkpoints": entries, "unfinished": list(self.unfinished)}
        return json.dumps(whole, indent=1, sort_keys=True).encode()

    @staticmethod
    def parse(data: bytes, where: str) -> RemoteIndex:
        """What written() gave; raises CheckpointError where it is anything else."""
        try:
            return _index(json.loads(data))
        except (*WRONG, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{where} is no list of checkpoints ({type(error).__name__}: {error}); needed: one that a "
                "run wrote, or a target without any"
            ) from None


def step_of(name: str) -> int:
    """The step of a checkpoint, from its name."""
    return int(name.removeprefix("step-"))


def is_name(name: str) -> bool:
    """Whether a folder is named as a checkpoint is."""
    return NAME.fullmatch(name) is not None and name == f"step-{step_of(name):08d}"


def _index(raw: Mapping[str, Any]) -> RemoteIndex:
    entries = {_name(name): _entry(name, entry) for name, entry in raw["checkpoints"].items()}
    unfinished = tuple(map(_folder, raw["unfinished"]))
    if set(unfinished) & {entry.folder for entry in entries.values()}:
        raise ValueError("a checkpoint is both whole and unfinished")
    return RemoteIndex(_word(raw["run"]), entries, unfinished)


def _entry(name: str, raw: Mapping[str, Any]) -> Entry:
    folder = _folder(raw["folder"])
    if folder.partition(".")[0] != name:
        raise ValueError(f"{folder} is no folder of {name}")
    manifest, total = raw["manifest"], raw["bytes"]
    if not SUM.fullmatch(manifest) or type(total) is not int or total < 0:
        raise ValueError("an entry without the sum of a manifest or its bytes")
    numbers = {k: float(v) for k, v in raw["metrics"].items() if isinstance(v, int | float)}
    metrics = {k: v for k, v in numbers.items() if math.isfinite(v)}
    return Entry(folder, manifest, total, _word(raw["session"]), metrics)


def _name(name: Any) -> str:
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"{name!r} is no name of a checkpoint")
    return name


def _folder(name: Any) -> str:
    if not isinstance(name, str) or not FOLDER.fullmatch(name):
        raise ValueError(f"{name!r} is no folder of a checkpoint")
    return name


def _word(word: Any) -> str:
    if not isinstance(word, str) or not re.fullmatch(r"\w{1,64}", word):
        raise ValueError(f"{word!r} is no identifier")
    return word
