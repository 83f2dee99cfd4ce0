"""A job filled from the newest checkpoint that can be trusted: whole, and with weights that are finite."""

from __future__ import annotations

from pathlib import Path

from mm.checkpoint.finite import found_anywhere
from mm.checkpoint.remote.start import find_or_fetch
from mm.checkpoint.state import Resumed, load, state_tensors
from mm.config.remote import CopyConfig
from mm.data.sample import Index
from mm.ranks.job import Job


def load_newest(
    job: Job, index: Index, directory: Path, *, own: bool = False
) -> tuple[Path | None, Resumed | None]:
    """Fill the job from the checkpoint that it resumes from, of find_or_fetch(); None where there is none.

    A checkpoint whose weights or optimizer state are not finite would break every step after it. It is named,
    and the next older one is taken. own: those of `directory` alone, whatever the config says. Every rank
    calls this. Raises CheckpointError where all are damaged or not finite.
    """
    cfg, wrong = job.blueprint.cfg, dict[Path, str]()
    if own:
        here = cfg.checkpoint.model_copy(update={"resume": "auto", "remote": CopyConfig()})
        cfg = cfg.model_copy(update={"checkpoint": here})
    while (path := find_or_fetch(cfg, directory, job.rank, wrong)) is not None:
        state = load(job, index, path)
        found = found_anywhere(job, state_tensors(job).items())
        if not found:
            return path, state
        wrong[path] = f"{path} has weights or optimizer state that are not finite: {found}"
    return None, None
