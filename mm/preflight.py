"""What a run reads and writes, looked at before any rank starts: ranks take seconds to say the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mm.checkpoint import candidates
from mm.config import Config
from mm.data.index import find_shards
from mm.errors import CheckpointError, Refused
from mm.launch import restarted
from parallel.checkpoint import MANIFEST


def check_paths(cfg: Config) -> None:
    """Refuse a run folder that cannot be written, data that is not there, and a start from nowhere.

    The run folder is made. Raises Refused, DataError or CheckpointError.
    """
    folder = Path(cfg.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(
            f"run.dir {folder} cannot be written: {error.strerror}; needed: a folder that can"
        ) from error
    for patterns in (cfg.data.train, cfg.data.eval):
        find_shards(patterns, cfg.base)
    if restarted():  # what it began from may be gone: it goes on from its own
        return
    candidates(cfg, folder)
    weights = cfg.checkpoint.weights
    if weights is not None and not any(
        (Path(weights) / name).is_file() for name in (MANIFEST, "config.json")
    ):
        raise CheckpointError(
            f"checkpoint.weights={weights} is neither a checkpoint (with a {MANIFEST}) nor a Hugging Face "
            "folder (with a config.json)"
        )
