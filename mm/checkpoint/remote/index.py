"""checkpoints.json of a target: which checkpoints are whole there. What it does not name is not read.

    {"run": "5f0c..", "checkpoints": {"step-00000120": {"manifest": SHA256, "bytes": 9, "session": "81ba..",
     "metrics": {"loss": 1.5}}}, "unfinished": ["step-00000140"]}

It is written before a copy begins (the name under `unfinished`), and when all of it is there, so a reader
never takes half a copy. Each entry has the sum of its manifest, and that has the sums of the files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.errors import CheckpointError

INDEX = "checkpoints.json"
MOST_BYTES = 64 << 20  # of it
NAME = re.compile(r"step-[0-9]{8,18}")
WRONG = (TypeError, LookupError, AttributeError, ArithmeticError)  # what other data than an index raise
SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A checkpoint that is whole in a target. manifest: sha256 of its manifest.json. bytes: of all its files.
    session: which start of the run has copied it. metrics: numbers that it may be kept for."""

    manifest: str
    bytes: int
    session: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RemoteIndex:
    """run: whose target it is. checkpoints: by name. unfinished: names whose files are those of a copy that
    was begun, or of a checkpoint that went; they are removed before the next copy."""

    run: str
    checkpoints: Mapping[str, Entry] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()

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
    entries = {_name(name): _entry(entry) for name, entry in raw["checkpoints"].items()}
    unfinished = tuple(map(_name, raw["unfinished"]))
    if set(unfinished) & entries.keys():
        raise ValueError("a checkpoint is both whole and unfinished")
    return RemoteIndex(_word(raw["run"]), entries, unfinished)


def _entry(raw: Mapping[str, Any]) -> Entry:
    manifest, total = raw["manifest"], raw["bytes"]
    if not SUM.fullmatch(manifest) or type(total) is not int or total < 0:
        raise ValueError("an entry without the sum of a manifest or its bytes")
    metrics = {k: float(v) for k, v in raw["metrics"].items() if isinstance(v, int | float)}
    return Entry(
        manifest, total, _word(raw["session"]), {k: v for k, v in metrics.items() if math.isfinite(v)}
    )


def _name(name: Any) -> str:
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"{name!r} is no name of a checkpoint")
    return name


def _word(word: Any) -> str:
    if not isinstance(word, str) or not re.fullmatch(r"\w{1,64}", word):
        raise ValueError(f"{word!r} is no identifier")
    return word
