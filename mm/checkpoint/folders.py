"""Published folders in and out: to checkpoints, and from checkpoints of any layout back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llm.config import LLMConfig
from llm.hf import FAMILIES, export_checkpoint, load_hf
from llm.hf.export import check_zero
from llm.hf.stored import Stored
from mm.checkpoint.alone import check_free, save_alone
from mm.checkpoint.state import tokenizer_of
from mm.checkpoint.tokens import item_tokens, named_ids
from mm.checkpoint.whole import one_process, read_whole
from mm.config.build import build
from mm.config.outline import SINK, llm_config
from mm.config.schema import shown
from mm.containers.card import (
    CARD,
    PROJECTOR,
    README,
    card_of,
    encoder_contents,
    projector_contents,
    readme,
)
from mm.containers.container import Container, Whole
from mm.containers.registry import CONTAINERS, fitting, is_whole, misfits
from mm.containers.write import files_of, with_constants
from mm.data.published import TOKENIZER
from mm.data.tokenizer import AnyTokenizer, make_tokenizer
from mm.data.tokenizer_files import keep_tokenizer, write_tokenizer
from mm.errors import CheckpointError, Refused
from mm.plan.adapters import low_rank
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.whole import whole_of
from parallel import checkpoint as store
from parallel.published import FILE_BYTES, Fetch, module_tensors, new_folder, write_folder

DType = torch.dtype | None


def import_hf(folder: Path, out: Path) -> str:
    """Write the model of a Hugging Face folder as a checkpoint in `out`: a language model, or a whole model
    with its encoders and projectors. One process.

    Raises CheckpointError where the folder is of another family, incomplete, or has unknown tensors.
    """
    check_free(out)
    if store.published(out):
        raise CheckpointError(f"{out} has checkpoints already; needed: a new folder")
    try:
        if not is_whole(folder):
            model = load_hf(folder).model
            state: dict[str, Any] = {SINK: asdict(model.cfg)}
            tensors = {f"{SINK}.{key}": t for key, t in module_tensors(model).items()}
        else:
            blueprint, modules = read_whole(folder)
            state = {"config": _on_its_own(blueprint), "bad_samples": [], "fingerprint": ""}
            tensors = {f"{m}.{key}": t for m, x in modules.items() for key, t in module_tensors(x).items()}
        if (folder / TOKENIZER).is_file():
            keep_tokenizer(make_tokenizer(str(folder)), out)
    except (ValueError, Refused) as error:
        raise CheckpointError(str(error)) from error
    path = save_alone(out, 0, tensors, state)
    return f"{path}: {len(tensors)} tensors; start a run from it with checkpoint.weights={path}"


def _on_its_own(blueprint: Blueprint) -> dict[str, Any]:
    """The config of a folder's model without the folder, as that of a run, which is resumed by nothing."""
    raw = shown(blueprint.cfg)
    for name, use in blueprint.inputs.encoders.items():
        module = {**raw["model"][name], "weights": None, "options": asdict(use.cfg)}
        raw["model"][name] = {**module, "projector": {**module["projector"], "weights": None}}
    raw["model"][SINK] = asdict(blueprint.llm)
    raw["checkpoint"]["weights"] = None
    raw["data"] = {**raw["data"], "train": ["none"], "tokenizer": "bytes"}
    return raw


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None,
    family: str | None = None,
    *,
    average: bool = False,
) -> str:
    """Write the model of a checkpoint, saved under any layout, as a new Hugging Face folder.

    A model with encoders is written as the container that can hold it, or else as a folder a module with a
    card (mm.containers.card). dtype: of the tensors; None keeps the checkpoint's. family: the model_type of a
    container, or of a language model, which is then written alone; None: the container that fits, and of a
    language model the family that it came from, or the first that can say it. average: of the weights, where
    the run kept one. Adapters are merged into the weights. Raises CheckpointError where the checkpoint is
    damaged or has no language model (or no average), and where the family cannot say it.
    """
    try:
        state = store.sound_state(checkpoint)
        if family is not None and family not in {*FAMILIES, *CONTAINERS}:
            known = ", ".join((*CONTAINERS, *FAMILIES))
            raise ValueError(
                f"{family!r} is neither a container nor a family of language models; known: {known}"
            )
        tokenizer = tokenizer_of(state, checkpoint)  # refused before anything is written
        if SINK in state:
            if family in CONTAINERS:
                raise ValueError(f"it has a language model alone, and a {family} folder has an encoder too")
            cfg = build(LLMConfig, state[SINK], "the checkpoint's llm")
            source = Stored(checkpoint, "", average)
        else:
            run = one_process(state, checkpoint)
            scales = {m: low_rank(lora).scale for m, lora in run.train.lora.items()}
            source = Stored(checkpoint, "", average, scales)
            if run.model and family not in FAMILIES:
                assert tokenizer is not None
                whole = whole_of(draw_up(run, 1))
                container, reasons = _container(whole, family)
                if container is None:
                    return _export_modules(whole, reasons, source, tokenizer, out=out, dtype=dtype)
                return _export_container(container, whole, source.fetch, tokenizer, out=out, dtype=dtype)
            if family in CONTAINERS:
                raise ValueError(f"it has no encoder, and a {family} folder has one")
            cfg = llm_config(run)
        export_checkpoint(replace(source, before=f"{SINK}."), out, cfg, dtype=dtype, family=family)
        if tokenizer is not None:
            write_tokenizer(tokenizer, out, trained=SINK not in state)
        return str(out)
    except (ValueError, KeyError, Refused) as error:
        raise CheckpointError(f"cannot export {checkpoint}: {error}") from error


def _container(whole: Whole, family: str | None) -> tuple[Container | None, dict[str, list[str]]]:
    """The container that a model is written as, and why others cannot hold it. Raises ValueError where
    `family` names one that cannot."""
    if family is None:
        return fitting(whole)
    wrong = misfits(CONTAINERS[family], whole)
    if wrong:
        raise ValueError(f"{CONTAINERS[family].title} cannot hold this model: {'; '.join(wrong)}")
    return CONTAINERS[family], {}


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")


def _export_container(
    container: Container, whole: Whole, values: Fetch, tokenizer: AnyTokenizer, out: Path, dtype: DType
) -> str:
    """Write a model as a container's folder."""
    tokens = item_tokens(tokenizer, whole, container.tokens)
    files = files_of(container, whole, {m: (t.id, t.text) for m, t in tokens.items()})
    config = {**files.contents.config, **named_ids(tokenizer, container)}
    files = replace(files, contents=replace(files.contents, config=config))
    check_zero(files.zero, values, container.title)
    partial = new_folder(out)
    write_folder(files.contents, with_constants(values, files.constants), partial, dtype, FILE_BYTES)
    for name, data in files.json.items():
        _write(partial / name, data)
    write_tokenizer(tokenizer, partial, trained=True)
    for token in tokens.values():
        token.write(partial)
    os.replace(partial, out)
    return f"{out}: {container.title}, {container.architecture} of transformers"


def _export_modules(
    whole: Whole,
    reasons: Mapping[str, list[str]],
    source: Stored,
    tokenizer: AnyTokenizer,
    out: Path,
    dtype: DType,
) -> str:
    """Write a folder a module with a card: the language model's, the encoders' and projectors' in it."""
    tokens = {m: tokenizer.placeholder_of(m) for m in whole.towers}
    card = {**card_of(whole, tokens), "begin": [tokenizer.bos]}  # as training packs samples
    partial, values = new_folder(out), source.fetch
    export_checkpoint(replace(source, before=f"{SINK}."), partial, whole.llm, dtype=dtype)
    for name, tower in whole.towers.items():
        contents, constants, said = encoder_contents(name, tower)
        write_folder(contents, with_constants(values, constants), partial / name, dtype, FILE_BYTES)
        if said is not None:
            for file, settings in said.processors.items():
                _write(partial / name / file, settings)
        projector = projector_contents(name, tower, whole.llm.d_model)
        if projector is not None:
            write_folder(projector, values, partial / name / PROJECTOR, dtype, FILE_BYTES)
    write_tokenizer(tokenizer, partial, trained=True)
    _write(partial / CARD, card)
    (partial / README).write_text(readme(whole, card, reasons))
    os.replace(partial, out)
    return f"{out}: a folder a module, joined as {CARD} and {README} in it say"
