"""The weighted mean of several checkpoints' weights, as a checkpoint."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.alone import check_free, save_alone
from mm.data.tokenizer_files import KEPT
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.sharding.optim import RULES


@dataclass(frozen=True)
class Mean:
    """The tensors that all checkpoints have, read one at a time. shares: of each, their sum is 1."""

    opened: Sequence[store.Opened]
    shares: Sequence[float]
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    def __call__(self, name: str) -> Tensor:
        """The mean of a tensor, worked out in float64; of integers, the last checkpoint's."""
        shape, kind = self.shapes[name]
        if not kind.is_floating_point:
            return self.opened[-1].read([name])[name]
        total = torch.zeros(shape, dtype=torch.float64)
        for opened, share in zip(self.opened, self.shares, strict=True):
            total.add_(opened.read([name])[name].to(torch.float64), alpha=share)
        return total.to(kind)


def average_checkpoints(out: Path, paths: Sequence[Path], weights: Sequence[float] | None = None) -> str:
    """Write the mean of the checkpoints' weights and buffers to a checkpoint in `out`; returns what was done.

    weights: of each, not negative, in any scale; None: all alike. One process, which holds one tensor at a
    time (in float64, and as it is read). The result has the config of the last, and no optimizer state: runs
    start from it with checkpoint.weights. Raises CheckpointError where a checkpoint is damaged or of another
    model.
    """
    check_free(out)
    try:
        opened = [store.Opened(p) for p in paths]
        mean = Mean(opened, _shares(weights, len(paths)), _common(opened))
        state = store.read_state(paths[-1])
    except ValueError as error:
        raise CheckpointError(f"cannot average: {error}") from error
    step = state.pop("step")
    if (out / f"step-{step:08d}").exists():
        raise CheckpointError(
            f"cannot average: {out} has a checkpoint of step {step}; needed: another folder"
        )
    path = save_alone(out, step, store.Lazy(mean.shapes, mean), state)
    kept = paths[-1].parent / KEPT
    if kept.is_dir() and kept != out / KEPT:
        shutil.copytree(kept, out / KEPT, dirs_exist_ok=True)
    of = f"the mean of {len(paths)} checkpoints"
    return f"{path}: {of}; start a run from it with checkpoint.weights={path}"


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    given = [1.0] * n if weights is None else list(weights)
    if len(given) != n or min(given) < 0 or not 0 < sum(given) < math.inf:
        raise ValueError(
            f"{n} checkpoints have the weights {given}; needed: one for each, finite, not negative, not all "
            "zero"
        )
    return [w / sum(given) for w in given]


def _common(opened: Sequence[store.Opened]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The weights and buffers that the checkpoints hold, with their shapes; equal in all of them."""
    found: list[dict[str, Any]] = []
    for one in opened:
        try:
            store.sound_state(one.path)
        except store.BadCheckpoint as error:
            raise ValueError(f"{one.path}: {error}") from error
        found.append({k: v for k, v in one.shapes.items() if not _of_optimizer(k)})
    for one, theirs in zip(opened, found, strict=True):
        other = sorted(k for k in theirs.keys() | found[0].keys() if theirs.get(k) != found[0].get(k))
        if other:
            raise ValueError(
                f"{one.path} is of another model than {opened[0].path}: {len(other)} tensors differ or are "
                f"in one only, first {other[0]}; needed: checkpoints of one model"
            )
    return found[0]


def _of_optimizer(name: str) -> bool:
    return name.split(".")[1] in RULES
