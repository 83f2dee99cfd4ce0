"""Distributed checkpoints that any layout can load: tensors by global shape, and a manifest of every file.

This room trusts no file that it reads: it checks names, sizes and sums, and never runs code from a pickle.
What a job stores in a checkpoint is decided elsewhere (mm.checkpoint) and may not enter.

    save(directory, step, tensors, state, keep=3)   distributed.py: every rank writes its shards
    Lazy(shapes, read)                              lazy.py: tensors made as they are written
    plan_share(tensors), write_share(share, ..)     share.py: the same in the background, rank by rank
    published(directory), read_state(path)          folder.py, distributed.py: what there is to load
    verify(path)                                    manifest.py: sizes and sha256 of all files
    load(path, tensors)                             distributed.py: fills tensors in place, in any layout
    Opened(path).read(names)                        opened.py: some whole tensors, in one process
    Handover(hold(tensors), ..).fill(others)        handover.py: the same in memory, without a checkpoint

metadata.py reads the pickle of torch.distributed.checkpoint without unpickling its classes.
"""

from parallel.checkpoint.distributed import (
    check_fits,
    describe,
    first_cause,
    load,
    read_state,
    save,
    sound_state,
)
from parallel.checkpoint.folder import (
    LATEST,
    STATE,
    Stay,
    check_there,
    final_of,
    foreign,
    newest,
    partial_of,
    point,
    published,
    remove,
    remove_leftovers,
    step_of,
    write_whole,
)
from parallel.checkpoint.handover import Handover, Held, hold
from parallel.checkpoint.lazy import Lazy
from parallel.checkpoint.manifest import MANIFEST, BadCheckpoint, structure, verify
from parallel.checkpoint.opened import Opened
from parallel.checkpoint.share import Share, plan_share, publish_shares, write_share

__all__ = [
    "LATEST",
    "MANIFEST",
    "STATE",
    "BadCheckpoint",
    "Handover",
    "Held",
    "Lazy",
    "Opened",
    "Share",
    "Stay",
    "check_fits",
    "check_there",
    "describe",
    "final_of",
    "first_cause",
    "foreign",
    "hold",
    "load",
    "newest",
    "partial_of",
    "plan_share",
    "point",
    "publish_shares",
    "published",
    "read_state",
    "remove",
    "remove_leftovers",
    "save",
    "sound_state",
    "step_of",
    "structure",
    "verify",
    "write_share",
    "write_whole",
]
