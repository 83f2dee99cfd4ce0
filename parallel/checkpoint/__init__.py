"""Distributed checkpoints that any layout can load: tensors by global shape, a manifest of every file.

Reading trusts no file. What a job puts into a checkpoint is not decided here.
"""

from parallel.checkpoint.distributed import (
    STATE,
    check_fits,
    describe,
    first_cause,
    load,
    published,
    read_state,
    save,
    step_of,
)
from parallel.checkpoint.manifest import MANIFEST, BadCheckpoint, structure, verify

__all__ = [
    "MANIFEST",
    "STATE",
    "BadCheckpoint",
    "check_fits",
    "describe",
    "first_cause",
    "load",
    "published",
    "read_state",
    "save",
    "step_of",
    "structure",
    "verify",
]
