"""Checkpoints of a job: their tensors, their state.json, and the ones that a config names."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.checkpoint.course import changes, config_of, refused, worth_saying
from mm.checkpoint.sums import changed_samples
from mm.config.schema import Config, resolve, shown
from mm.data.published import PublishedTokenizer
from mm.data.remote.urls import is_remote, public
from mm.data.sample import Index
from mm.data.tokenizer import AnyTokenizer, make_tokenizer
from mm.data.tokenizer_files import KEPT
from mm.errors import CheckpointError
from mm.order.skips import Skips
from mm.plan.blueprint import Blueprint, bare_module
from mm.plan.drawn import NOTHING, Drawn, differences, history
from mm.ranks.job import Job
from parallel import checkpoint as store
from parallel.sharding import whole
from parallel.topology.axis import Axes

EMPTY: Mapping[str, Any] = MappingProxyType({})
MOST = sys.float_info.max  # JSON has longer numbers, which are no float


class Given(NamedTuple):
    """Of what a step leaves, all but the tensors: samples known to be unreadable, what the steps so far have
    taken, metrics by which checkpoints may be kept, and the numbers that are watched (mm.train.guard)."""

    step: int
    bad: Collection[int] = ()
    drawn: Drawn = NOTHING
    metrics: Mapping[str, float] = EMPTY
    guard: Mapping[str, Any] = EMPTY


def state_tensors(job: Job) -> dict[str, Tensor]:
    """Every tensor of the modules on this rank: parameters, buffers and optimizer moments, by full name."""
    out: dict[str, Tensor] = {}
    for name, parts in job.parts.items():
        for part in parts.values():
            whole.free(part)  # to read the shards
            for key, param in part.named_parameters():
                out[f"{name}.{key}"] = param.detach()
            for key, value in part.state_dict().items():
                if f"{name}.{key}" not in out and isinstance(value, torch.Tensor):
                    out[f"{name}.{key}"] = value
        for key, value in job.optimizers[name].state().items():
            out[f"{name}.{key}"] = value
    return out


def buffers(job: Job) -> dict[str, Tensor]:
    """The buffers of the modules on this rank, by full name: state_tensors() has those that are kept."""
    return {
        f"{module}.{name}": buffer
        for module, parts in job.parts.items()
        for part in parts.values()
        for name, buffer in part.named_buffers()
    }


def fingerprint(blueprint: Blueprint) -> str:
    """A digest of what must not change between saving and resuming: model, tokenizer, seed, global batch.

    The layout may change, and what of the data has not been drawn yet (mm/plan/drawn.py).
    """
    cfg = resolve(blueprint.cfg)
    kept = {"model": cfg["model"], "seed": cfg["run"]["seed"]}
    kept["global_batch"] = cfg["train"]["global_batch"]
    if cfg["train"]["lora"]:
        # Not what they started from: a run resumes without it.
        lora = cfg["train"]["lora"].items()
        kept["lora"] = {m: {k: v for k, v in one.items() if k != "weights"} for m, one in lora}
    tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    if isinstance(tokenizer, PublishedTokenizer):
        kept["tokenizer"] = tokenizer.vocabulary
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def with_kept(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint's config, with the tokenizer that was kept beside it where there is one."""
    kept = path.parent / KEPT
    data = {**config["data"], **({"tokenizer": str(kept)} if kept.is_dir() else {})}
    return {**config, "data": data}


def tokenizer_of(state: Mapping[str, Any], path: Path) -> AnyTokenizer | None:
    """The tokenizer of a checkpoint; None for a language model that was imported without one."""
    if "config" in state:
        return make_tokenizer(with_kept(state["config"], path)["data"].get("tokenizer", "bytes"))
    kept = path.parent / KEPT
    return make_tokenizer(str(kept)) if kept.is_dir() else None


def contents(blueprint: Blueprint, index: Index, given: Given) -> dict[str, Any]:
    """What a checkpoint has beside its tensors, as plain data."""
    drawn = given.drawn
    return {
        "fingerprint": fingerprint(blueprint),
        "data": history(blueprint.cfg, index, given.step, drawn.cursor, drawn.left_out),
        "drawn": drawn.to_json(),
        "bad_samples": sorted(given.bad),
        "guard": dict(given.guard),
        "metrics": dict(given.metrics),
        "config": shown(blueprint.cfg),
    }


def candidates(cfg: Config, directory: Path) -> list[Path]:
    """The checkpoints that checkpoint.resume names, newest first.

    They are those of the run's folder (auto), none, or one at a path. Raises CheckpointError where the path
    has none.
    """
    wanted = cfg.checkpoint.resume
    if wanted == "none":
        return []
    if wanted == "auto":
        return store.published(directory)[::-1]
    check_local("checkpoint.resume", wanted)
    path = Path(wanted)
    found = [path] if _is_checkpoint(path) else store.published(path)[-1:]
    if not found:
        if theirs := store.foreign(path):
            raise CheckpointError(f"checkpoint.resume={path}: {theirs}")
        what = "is no checkpoint, and has none inside" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint.resume={path} {what} (step-* with a {store.MANIFEST})")
    return found


def check_local(key: str, path: str) -> None:
    """Refuse a URL where a folder of this machine is needed; raises CheckpointError."""
    if is_remote(path):
        raise CheckpointError(
            f"{key}={public(path)} is a URL; needed: a path, of what `checkpoint fetch URL/step-.. "
            "FOLDER` has brought here"
        )


def _is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in (store.MANIFEST, store.STATE))


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after `step` steps, with these samples known to be unreadable. drawn: what these
    steps have taken. guard: the numbers that were watched (mm.train.guard). changed: lines on what of the
    config is different from then on."""

    step: int = 0
    bad_samples: frozenset[int] = frozenset()
    drawn: Drawn = NOTHING
    guard: Mapping[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def load(job: Job, index: Index, path: Path) -> Resumed:
    """Fill the job from a checkpoint written under any layout; every rank calls this.

    Raises CheckpointError where it is damaged or was written by another run.
    """
    try:
        state = store.load(path, state_tensors(job))
    except store.BadCheckpoint as error:
        raise _unfit(error, job.blueprint, path) from error
    changed = _check_same_run(state, job.blueprint, index, path)
    bad = state.get("bad_samples")
    if not isinstance(bad, list) or any(type(sample) is not int for sample in bad):
        raise CheckpointError(f"{path}: {store.STATE} does not say which samples are bad")
    drawn = Drawn.from_json(state["drawn"])
    return Resumed(state["step"], frozenset(bad), drawn, watched(state, path), tuple(changed))


def watched(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The numbers that were watched. Raises CheckpointError where they are none."""
    guard = state.get("guard", {})
    if isinstance(guard, dict) and guard.keys() <= {"left_out", "losses", "high", "back"}:
        left_out, losses = guard.get("left_out", []), guard.get("losses", [])
        counts = [guard.get("high", 0), guard.get("back", 0)]
        if isinstance(left_out, list) and isinstance(losses, list):
            whole = all(type(n) is int and n >= 0 for n in [*counts, *left_out])
            if whole and all(type(loss) in (int, float) and abs(loss) <= MOST for loss in losses):
                return guard
    raise CheckpointError(f"{path}: {store.STATE} does not say which numbers were watched")


def _unfit(error: store.BadCheckpoint, blueprint: Blueprint, path: Path) -> CheckpointError:
    """What is wrong with a checkpoint, and what of the model is different in its config."""
    try:
        why = refused(changes(store.read_state(path)["config"], shown(blueprint.cfg)))
    except (store.BadCheckpoint, KeyError):
        why = ""
    return CheckpointError(f"{error}; of its config {why}" if why else str(error))


def check_resume(blueprint: Blueprint, index: Index, path: Path) -> None:
    """Refuse a checkpoint that a run cannot resume from, by names and shapes; reads no tensor data."""
    try:
        stored = {name: shape for name, (shape, _) in store.describe(path).items()}
        for m in blueprint.modules:
            store.check_fits(path, stored, model_shapes(blueprint, m))
        _check_same_run(store.read_state(path), blueprint, index, path)
    except store.BadCheckpoint as error:
        raise _unfit(error, blueprint, path) from error


def model_shapes(blueprint: Blueprint, module: str) -> dict[str, tuple[int, ...]]:
    """Global shape of every parameter and kept buffer of a module, by full name; takes no memory."""
    return {
        f"{module}.{key}": tuple(tensor.shape)
        for stage in blueprint.stages[module]
        for key, tensor in bare_module(blueprint, module, Axes(), stage).state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def _check_same_run(state: Mapping[str, Any], blueprint: Blueprint, index: Index, path: Path) -> list[str]:
    """Lines on what of the config is different. Raises CheckpointError where a run cannot go on so."""
    found = changes(config_of(state), shown(blueprint.cfg))
    if state.get("fingerprint") != fingerprint(blueprint) or "drawn" not in state:
        why = refused(found) if "config" in state else "its state names no config"
        raise CheckpointError(
            f"{path} was written by a run with another model, tokenizer, seed or global batch: "
            f"{why or 'the tokenizer has another vocabulary'}; needed: the values that it had, or another "
            "run.dir, started by checkpoint.weights, or afresh here with checkpoint.resume=none"
        )
    try:
        drawn = Drawn.from_json(state["drawn"])
        drawn.going_on(state["step"], Skips.parse(blueprint.cfg.data.skip))
        now = history(blueprint.cfg, index, state["step"], drawn.cursor, drawn.left_out)
        wrong = differences(state["data"], now, partial(changed_samples, path.parent, index))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {store.STATE} does not say what was drawn of the data") from error
    if wrong:
        raise CheckpointError(
            f"{path} was written by a run with other data: {'; '.join(wrong)}. A run goes on where nothing "
            "that it has drawn from changes; needed: the data as they were, or checkpoint.resume=none"
        )
    return [f"changed since {path.name}: {c}" for c in worth_saying(found)]


def inspect_text(path: Path) -> str:
    """Step, tensors and sizes of a checkpoint; reads no tensor data."""
    try:
        store.check_there(path)
    except store.BadCheckpoint as error:
        raise CheckpointError(f"{path}: {error}") from error
    wrong = store.structure(path)
    if wrong:
        raise CheckpointError(f"{path} is damaged: {'; '.join(wrong)}")
    try:
        return tensors_text(path, str(path))
    except store.BadCheckpoint as error:
        raise CheckpointError(str(error)) from error


def tensors_text(path: Path, name: str) -> str:
    """Step, tensors and sizes by a checkpoint's state and metadata; name: of it. Raises BadCheckpoint."""
    state, tensors = store.read_state(path), store.describe(path)
    lines = [f"{name}: after step {state['step']}, {len(tensors)} tensors"]
    lines += [
        f"  {name:<60} {str(dtype).removeprefix('torch.'):<9} {list(shape)}"
        for name, (shape, dtype) in sorted(tensors.items())
    ]
    return "\n".join(lines)
