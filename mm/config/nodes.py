"""How ranks are placed on nodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm.config.schema import Config


def node_size(cfg: Config, world: int) -> int | None:
    """Ranks a node: run.node_size, else those that were started on this machine. None where one node has all
    ranks."""
    size = cfg.run.node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return size if size < world else None
