"""Weights that a run starts from: checkpoints of ours, Hugging Face folders."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from encoders.module import EncoderModule
from llm.hf import load_weights
from llm.hf.peft import AdapterFolder, adapter_tensors
from llm.hf.weights import check_folder
from llm.model import LLM
from mm.checkpoint.resume import verify
from mm.checkpoint.state import model_shapes
from mm.checkpoint.whole import fill_encoder
from mm.config.outline import SINK, llm_config
from mm.config.schema import Config
from mm.errors import CheckpointError
from mm.plan.adapters import low_rank
from mm.plan.blueprint import Blueprint
from mm.ranks.job import Job
from parallel import checkpoint as store
from parallel.checkpoint import Held
from parallel.comm.transport import Channel
from parallel.published import FileTensor, SafeFolder, module_tensors, read_some
from parallel.sharding import whole
from parallel.sharding.low_rank import is_adapter

IN_MEMORY = "in memory from the stage before"  # where a module's weights came from


def start_from(job: Job, paths: Sequence[Path], before: Held | None = None) -> dict[str, str]:
    """Fill the job's weights before its first step; every rank calls this.

    paths: Hugging Face folders, whose weights are the language model's; or checkpoints of ours, written under
    any layout, with weights of any of the modules. A module takes the first that has it. Each rank reads what
    it holds.
    before: what left_by() gave of an earlier job in these processes; it comes before all paths.

    Returns by module where its weights came from. Raises CheckpointError where they do not fit or are
    damaged, and PolyrankError where a rank does not answer.
    """
    came = {} if before is None else dict.fromkeys(_take_over(job, before), IN_MEMORY)
    for path in paths:
        left = set(job.blueprint.modules) - came.keys()
        if left:
            came |= dict.fromkeys(_start_from(job, path, left) & left, f"from {path}")
    return came


def left_by(job: Job) -> Held:
    """The weights of a job on this rank: its shards, not copied. The rest of the job may be freed."""
    for part in job.modules():
        whole.free(part)  # to read the shards
    return store.hold(_weights(job, job.parts))


def _weights(job: Job, modules: Collection[str]) -> dict[str, Tensor]:
    """Parameters and kept buffers of some modules on this rank, by full name."""
    return {
        f"{name}.{key}": t
        for name, parts in job.parts.items()
        if name in modules
        for part in parts.values()
        for key, t in module_tensors(part).items()
    }


def _take_over(job: Job, before: Held) -> set[str]:
    """Fill the modules that an earlier job had; returns these, also where this rank does not host them."""
    try:
        channel = Channel("weights in memory", job.control.group, job.rank.timeout_s)
        there = store.Handover(before, channel, job.rank.device, node_size=job.rank.node_size)
        found = {key.partition(".")[0] for key in there.shapes} & {*job.blueprint.modules}
        taken = _all_taken(there.shapes, job.blueprint, found)
        there.fill({key: t for key, t in _weights(job, found).items() if key in taken})
        return found
    except ValueError as error:
        raise CheckpointError(f"cannot start from the stage before: {error}") from error
    except RuntimeError as error:
        raise job.control.overdue(error) from error


def _start_from(job: Job, path: Path, wanted: Collection[str]) -> set[str]:
    """Fill the wanted modules that `path` has; returns these, also where this rank does not host them."""
    try:
        if (path / "config.json").is_file():
            folder = SafeFolder(path)
            for part in job.parts.get(SINK, {}).values() if SINK in wanted else ():
                assert isinstance(part, LLM)
                load_weights(part, folder, job.meshes[SINK])
            return {SINK}
        wrong = verify(path, job.rank)
        if wrong:
            raise CheckpointError(f"cannot start from {path}: it is damaged: {'; '.join(wrong)}")
        stored = _describe(path, job.blueprint)
        found = {key.partition(".")[0] for key in stored} & {*wanted}
        taken = _all_taken(stored, job.blueprint, found)
        store.load(path, {key: t for key, t in _weights(job, found).items() if key in taken})
        return found
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


def fill_adapters(job: Job) -> None:
    """Fill the language model's adapters from the folder train.lora.llm.weights, if any.

    Every rank calls this. Each rank reads what it holds. Raises CheckpointError where it does not fit.
    """
    found = published_adapters(job.blueprint.cfg)
    if found is not None:
        for part in job.parts.get(SINK, {}).values():
            read_some(part, found[1], found[0], job.meshes[SINK])


def published_adapters(cfg: Config) -> tuple[AdapterFolder, list[FileTensor]] | None:
    """The folder train.lora.llm.weights and its tensors, of which nothing is read; None where there is none.

    Raises CheckpointError where it does not fit the model.
    """
    given = cfg.train.lora.get(SINK)
    if given is None or given.weights is None:
        return None
    try:
        folder = AdapterFolder(given.weights)
        return folder, adapter_tensors(llm_config(cfg), low_rank(given), folder)
    except ValueError as error:
        raise CheckpointError(f"train.lora.{SINK}.weights: {error}") from error


def fill_encoders(job: Job, filled: Collection[str] = ()) -> None:
    """Fill the encoders that have model.X.weights from their folders, and projectors likewise; every rank
    calls this.

    filled: modules that have their weights already. Each rank reads what it holds. Raises CheckpointError
    where a folder does not fit.
    """
    for name, parts in job.parts.items():
        if name == SINK or name in filled:
            continue
        try:
            for part in parts.values():
                assert isinstance(part, EncoderModule)
                fill_encoder(part, job.blueprint, name, job.meshes[name])
        except ValueError as error:
            raise CheckpointError(f"model.{name}.weights: {error}") from error


def check_weights(blueprint: Blueprint, path: Path) -> None:
    """Refuse what start_from() would, from names and shapes; reads no tensor data. Raises CheckpointError."""
    try:
        if (path / "config.json").is_file():
            check_folder(blueprint.llm, SafeFolder(path))
            return
        stored = {name: shape for name, (shape, _) in _describe(path, blueprint).items()}
        for m in blueprint.modules:
            if any(key.startswith(f"{m}.") for key in stored):
                store.check_fits(path, stored, _taken(stored, blueprint, m))
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


def _all_taken(stored: Collection[str], blueprint: Blueprint, modules: Collection[str]) -> set[str]:
    """The names of _taken() of some modules."""
    return {key for name in modules for key in _taken(stored, blueprint, name)}


def _taken(stored: Collection[str], blueprint: Blueprint, module: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a module, with their shapes, that it takes from a checkpoint that stores these.

    Adapters that the checkpoint lacks stay as they start. Raises ValueError where it has adapters that the
    model lacks: its weights without them are another model.
    """
    shapes = model_shapes(blueprint, module)
    theirs = {key for key in stored if key.startswith(f"{module}.") and is_adapter(key)}
    lost = sorted(theirs - shapes.keys())
    if lost:
        raise ValueError(
            f"it has adapters that this model lacks, first {lost[0]}; needed: the same "
            f"train.lora.{module}, or weights that `checkpoint export` has merged"
        )
    return {key: shape for key, shape in shapes.items() if theirs or not is_adapter(key)}


def _describe(path: Path, blueprint: Blueprint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """store.describe(); raises ValueError where the checkpoint has none of the model's modules."""
    stored = store.describe(path)
    theirs = sorted({key.partition(".")[0] for key in stored})
    if not set(theirs) & set(blueprint.modules):
        raise ValueError(
            f"it has weights of {', '.join(theirs) or 'nothing'}, the model's modules are "
            f"{', '.join(blueprint.modules)}; needed: one of them at least"
        )
    return stored
