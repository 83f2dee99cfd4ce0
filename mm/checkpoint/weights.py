"""Published models in and out: Hugging Face folders to checkpoints, to the start of a run, and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from encoders.hf import fill, open_folder
from encoders.module import EncoderModule
from llm.config import LLMConfig
from llm.hf import export_checkpoint, load_hf, load_weights
from llm.hf.weights import check_folder
from llm.model import LLM
from mm.checkpoint.resume import verify
from mm.checkpoint.state import model_shapes
from mm.config.build import build
from mm.config.outline import SINK, llm_config
from mm.config.schema import from_mapping
from mm.errors import CheckpointError
from mm.plan.blueprint import Blueprint
from mm.ranks.job import Job
from parallel import checkpoint as store
from parallel.published import SafeFolder, module_tensors


def start_from(job: Job, path: Path) -> None:
    """Fill the job's weights from `path` before its first step; every rank calls this.

    path: a Hugging Face folder, whose weights are the language model's; or a checkpoint of ours, written
    under any layout, with weights of any of the modules. Each rank reads what it holds.
    Raises CheckpointError where they do not fit or are damaged.
    """
    try:
        if (path / "config.json").is_file():
            folder = SafeFolder(path)
            for part in job.parts.get(SINK, {}).values():
                assert isinstance(part, LLM)
                load_weights(part, folder, job.meshes[SINK])
            return
        wrong = verify(path, job.rank)
        if wrong:
            raise CheckpointError(f"cannot start from {path}: it is damaged: {'; '.join(wrong)}")
        stored = _describe(path, job.blueprint)
        tensors: dict[str, torch.Tensor] = {}
        for name, parts in job.parts.items():
            if any(key.startswith(f"{name}.") for key in stored):
                for part in parts.values():
                    tensors |= {f"{name}.{key}": t for key, t in module_tensors(part).items()}
        store.load(path, tensors)
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


def fill_encoders(job: Job) -> None:
    """Fill the encoders that have model.X.weights from their folders; every rank calls this.

    Each rank reads what it holds. Raises CheckpointError where a folder does not fit.
    """
    for name, parts in job.parts.items():
        weights = job.blueprint.cfg.model[name].weights if name != SINK else None
        if weights is None:
            continue
        try:
            opened = open_folder(weights, job.blueprint.cfg.model[name].encoder)
            for part in parts.values():
                assert isinstance(part, EncoderModule)
                fill(part, opened, job.meshes[name])
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
                store.check_fits(path, stored, model_shapes(blueprint, m))
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


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


def import_hf(folder: Path, out: Path) -> str:
    """Write the language model of a Hugging Face folder as a checkpoint in `out`. One process.

    Raises CheckpointError where the folder is of another family, incomplete, or has unknown tensors.
    """
    try:
        model = load_hf(folder).model
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    tensors = {f"{SINK}.{key}": t for key, t in module_tensors(model).items()}
    with (
        TemporaryDirectory() as folder_of_store
    ):  # a process group writes a checkpoint, here one of one process
        dist.init_process_group(
            dist.get_default_backend_for_device("cpu"),
            init_method=f"file://{folder_of_store}/store",
            rank=0,
            world_size=1,
        )
        try:
            path = store.save(out, 0, tensors, {SINK: asdict(model.cfg)}, keep=0)
        finally:
            dist.destroy_process_group()
    return f"{path}: {len(tensors)} tensors; start a run from it with checkpoint.weights={path}"


def export_hf(checkpoint: Path, out: Path, dtype: torch.dtype | None) -> str:
    """Write the language model of a checkpoint, saved under any layout, as a new Hugging Face folder.

    dtype: of the tensors; None keeps the checkpoint's. Raises CheckpointError where the checkpoint is damaged
    or has no language model.
    """
    try:
        wrong = store.verify(checkpoint)
        if wrong:
            raise store.BadCheckpoint(f"it is damaged: {'; '.join(wrong)}")
        state = store.read_state(checkpoint)
        if SINK in state:
            cfg = build(LLMConfig, state[SINK], "the checkpoint's llm")
        else:
            cfg = llm_config(from_mapping(state["config"], checkpoint))
        return str(export_checkpoint(checkpoint, out, cfg, name=SINK, dtype=dtype))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"cannot export {checkpoint}: {error}") from error
