"""A default process group of one process, which writing a checkpoint needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch.distributed as dist


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
