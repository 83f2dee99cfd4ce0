"""Published models in and out: Hugging Face folders to checkpoints, to the start of a run, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from encoders.hf import fill, open_folder
from encoders.module import EncoderModule
from llm.config import LLMConfig
from llm.hf import export_checkpoint, load_hf, load_weights
from llm.hf.stored import Stored
from llm.hf.weights import check_folder
from llm.model import LLM
from mm.checkpoint.alone import one_process
from mm.checkpoint.resume import verify
from mm.checkpoint.state import model_shapes, tokenizer_of, with_kept
from mm.config.build import build
from mm.config.outline import SINK, llm_config
from mm.config.schema import from_mapping
from mm.data.published import TOKENIZER
from mm.data.tokenizer import make_tokenizer
from mm.data.tokenizer_files import keep_tokenizer, write_tokenizer
from mm.errors import CheckpointError
from mm.plan.blueprint import Blueprint
from mm.ranks.job import Job
from parallel import checkpoint as store
from parallel.published import SafeFolder, module_tensors
from parallel.sharding.low_rank import is_adapter


def start_from(job: Job, paths: Sequence[Path]) -> None:
    """Fill the job's weights before its first step; every rank calls this.

    paths: Hugging Face folders, whose weights are the language model's; or checkpoints of ours, written under
    any layout, with weights of any of the modules. A module takes the first that has it. Each rank reads what
    it holds. Raises CheckpointError where they do not fit or are damaged.
    """
    left = set(job.blueprint.modules)
    for path in paths:
        left -= _start_from(job, path, left)


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
        found = {key.partition(".")[0] for key in stored}
        tensors = {
            f"{name}.{key}": t
            for name, parts in job.parts.items()
            if name in found & set(wanted)
            for part in parts.values()
            for key, t in module_tensors(part).items()
        }
        taken: set[str] = set()
        for name in found & {*wanted} & {*job.blueprint.modules}:
            taken |= _taken(stored, job.blueprint, name).keys()
        store.load(path, {key: t for key, t in tensors.items() if key in taken})
        return found
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
                store.check_fits(path, stored, _taken(stored, blueprint, m))
    except ValueError as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


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


def import_hf(folder: Path, out: Path) -> str:
    """Write the language model of a Hugging Face folder as a checkpoint in `out`. One process.

    Raises CheckpointError where the folder is of another family, incomplete, or has unknown tensors.
    """
    try:
        model = load_hf(folder).model
        if (folder / TOKENIZER).is_file():
            keep_tokenizer(make_tokenizer(str(folder)), out)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    tensors = {f"{SINK}.{key}": t for key, t in module_tensors(model).items()}
    with one_process():
        path = store.save(out, 0, tensors, {SINK: asdict(model.cfg)}, keep=0)
    return f"{path}: {len(tensors)} tensors; start a run from it with checkpoint.weights={path}"


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None,
    family: str | None = None,
    *,
    average: bool = False,
) -> str:
    """Write the language model of a checkpoint, saved under any layout, as a new Hugging Face folder.

    dtype: of the tensors; None keeps the checkpoint's. family: its model_type; None: the one that the model
    came from, or the first that can say it. average: of the weights, where the run kept one. Raises
    CheckpointError where the checkpoint is damaged or has no language model (or no average), and where the
    family cannot say it. Adapters are merged into the weights.
    """
    try:
        wrong = store.verify(checkpoint)
        if wrong:
            raise store.BadCheckpoint(f"it is damaged: {'; '.join(wrong)}")
        state = store.read_state(checkpoint)
        if SINK in state:
            cfg, scale = build(LLMConfig, state[SINK], "the checkpoint's llm"), 1.0
        else:
            run = from_mapping(with_kept(state["config"], checkpoint), checkpoint)
            cfg, lora = llm_config(run), run.train.lora.get(SINK)
            scale = 1.0 if lora is None else lora.alpha / lora.rank
        tokenizer = tokenizer_of(state, checkpoint)  # refused before anything is written
        source = Stored(checkpoint, SINK, average, scale)
        export_checkpoint(source, out, cfg, dtype=dtype, family=family)
        if tokenizer is not None:
            write_tokenizer(tokenizer, out, trained=SINK not in state)
        return str(out)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"cannot export {checkpoint}: {error}") from error
