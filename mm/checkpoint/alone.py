"""Checkpoints that one process writes, without a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mm.errors import CheckpointError
from parallel import checkpoint as store

RUN = "run.json"  # in the folder of a run that has begun


def save_alone(
    out: Path, step: int, tensors: Mapping[str, Tensor] | store.Lazy, state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint below `out`, and return its path; there is no default process group.

    Raises CheckpointError where it cannot be written, or a tensor cannot be made, and leaves nothing then.
    """
    try:
        with alone():
            return store.save(out, step, tensors, state, keep=0)
    except (OSError, ValueError, CheckpointException) as error:  # the last is a BaseException of torch's
        store.remove_leftovers(out)
        raise CheckpointError(f"nothing is written to {out}: {store.first_cause(error)}") from error


def check_free(out: Path) -> None:
    """Raise CheckpointError where a checkpoint that is no run's may not be written below `out`."""
    at = out.resolve()
    around = (p for p in (at, *at.parents) if p == at or p.name.startswith("step-"))
    inside = next((p for p in around if (p / store.MANIFEST).is_file()), None)
    if inside is not None:
        raise CheckpointError(
            f"{out}: {inside} is a checkpoint, and nothing is written inside one; needed: a folder for the "
            "new one, named before what it is made of"
        )
    if (out / RUN).is_file():
        raise CheckpointError(
            f"{out} is the folder of a run, which would take the new checkpoint for its own; needed: another"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Within it the default process group has this process alone; there must be none around it."""
    with TemporaryDirectory() as folder_of_store:
        dist.init_process_group(
            dist.get_default_backend_for_device("cpu"),
            init_method=f"file://{folder_of_store}/store",
            rank=0,
            world_size=1,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
