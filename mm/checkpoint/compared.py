"""Two checkpoints side by side: config, layout, and tensors by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.checkpoint.course import changes, config_of
from mm.config.flat import said
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.sharding.optim import RULES

MOST = 5  # tensors of a module that are named one by one, and keys of a config, unless all are asked


class TensorDifference(NamedTuple):
    """What differs in a tensor. largest: absolute; relative: to the largest element of the second."""

    name: str
    largest: float
    relative: float


def difference(name: str, one: Tensor, other: Tensor) -> TensorDifference | None:
    """How two tensors of one shape and dtype differ; None where they are equal to the bit."""
    if torch.equal(_bits(one), _bits(other)):
        return None
    a, b = one.to(torch.float64), other.to(torch.float64)
    largest, scale = float((a - b).abs().max()), float(b.abs().max())
    return TensorDifference(name, largest, largest / scale if scale else float("inf") if largest else 0.0)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def config_lines(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys of two configs that differ, a line each, those of layouts last."""
    differ = sorted(changes(one, other), key=lambda c: c.key.startswith("layout."))
    return [f"{c.key}: {said(c.was)} | {said(c.now)}" for c in differ]


def diff_text(one: Path, other: Path, *, everything: bool = False) -> str:
    """What differs between two checkpoints, whatever layouts wrote them.

    One process, which holds one tensor of each at a time. everything: names every tensor and key. Raises
    CheckpointError where one is damaged.
    """
    try:
        states = [_sound(path) for path in (one, other)]
        opened = [store.Opened(path) for path in (one, other)]
        lines = [f"{one}: after step {states[0]['step']}", f"{other}: after step {states[1]['step']}"]
        keys = config_lines(*(config_of(state) for state in states))
        lines.append(f"config: {len(keys)} keys differ" if keys else "config: equal")
        lines += _first(keys, everything)
        tensors = _tensor_lines(opened[0], opened[1], everything)
        return "\n".join(lines + tensors)
    except ValueError as error:
        raise CheckpointError(f"cannot compare: {error}") from error


def _sound(path: Path) -> dict[str, Any]:
    try:
        return store.sound_state(path, store.verify)
    except store.BadCheckpoint as error:
        raise ValueError(f"{path}: {error}") from error


def _first(lines: Sequence[str], everything: bool) -> list[str]:
    shown = lines if everything else lines[:MOST]
    more = len(lines) - len(shown)
    return [f"  {line}" for line in shown] + ([f"  .. {more} more (--all names them)"] if more else [])


def _tensor_lines(one: store.Opened, other: store.Opened, everything: bool) -> list[str]:
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in {**one.shapes, **other.shapes}:
        module, inner, *_ = [*name.split("."), ""]
        by_module[f"{module}, optimizer" if inner in RULES else module].append(name)
    lines = []
    for module, names in sorted(by_module.items()):
        equal, other_lines = 0, list[str]()
        found = list[TensorDifference]()
        for name in names:
            ours, theirs = one.shapes.get(name), other.shapes.get(name)
            if ours is None or theirs is None:
                where = other.path if ours is None else one.path
                other_lines.append(f"{name}: only in {where}")
            elif ours != theirs:
                said = " | ".join(f"{list(shape)} {str(kind)[6:]}" for shape, kind in (ours, theirs))
                other_lines.append(f"{name}: {said}")
            else:
                differs = difference(name, one.read([name])[name], other.read([name])[name])
                equal += differs is None
                found += [] if differs is None else [differs]
        found.sort(key=lambda d: -d.relative)
        other_lines += [f"{d.name}: at most {d.largest:.3g} apart, {d.relative:.3g} relative" for d in found]
        said = f"{equal} of {len(names)} tensors equal to the bit"
        if found:
            largest = max(d.largest for d in found)
            said += f"; largest difference {largest:.3g}, {found[0].relative:.3g} relative"
        lines += [f"{module}: {said}", *_first(other_lines, everything)]
    return lines
