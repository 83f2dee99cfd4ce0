"""The whole model of a run, a checkpoint or a published folder, in one process, whatever layout it had."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoders.module import EncoderModule
from llm.config import LLMConfig
from llm.hf import load_hf
from llm.model import LLM, precise_modules
from mm.checkpoint.state import tokenizer_of, with_kept
from mm.config.build import build
from mm.config.outline import SINK
from mm.config.schema import Config, from_mapping
from mm.data.published import TOKENIZER
from mm.data.tokenizer import AnyTokenizer, make_tokenizer
from mm.data.tokenizer_files import KEPT
from mm.errors import CheckpointError, Refused
from mm.plan.blueprint import Blueprint, bare_module, draw_up
from mm.plan.inputs import EncoderUse
from parallel import checkpoint as store
from parallel.published import module_tensors
from parallel.topology.axis import Axes

# What a run computed under is nothing to one process.
ONE_PROCESS: dict[str, Any] = {
    "kind": "auto",
    "ahead": None,
    "encoder_batch": {},
    "overlap_experts": False,
    "microbatches": 1,
}


@dataclass(frozen=True)
class WholeModel:
    """A model in eval mode, with what it takes to ask it."""

    llm: LLM
    encoders: Mapping[str, EncoderModule]
    """By module, each with its projector."""
    uses: Mapping[str, EncoderUse]
    """By module, how its items are prepared."""
    tokenizer: AnyTokenizer
    begin: tuple[int, ...]
    """Ids before a text that no chat template writes: as in training, or as published settings have it."""
    stops: frozenset[int]
    """Ids that end an answer, in the same way."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return next(self.llm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.llm.parameters()).device


def load_whole(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> WholeModel:
    """The model of a run's folder (its newest checkpoint), of a checkpoint, or of a published folder.

    dtype: of the weights; None: as they are stored. Weights that keep their dtype in training keep it here.
    Raises CheckpointError where there is no model, or its files do not fit.
    """
    path = Path(path)
    try:
        if (path / "config.json").is_file() and not (path / store.MANIFEST).is_file():
            found = _published(path)
        else:
            found = _checkpoint(path if (path / store.MANIFEST).is_file() else _newest(path))
    except (ValueError, KeyError, Refused) as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    for module in (found.llm, *found.encoders.values()):
        _cast(module, dtype)
        module.to(device).eval().requires_grad_(False)
    return found


def _newest_time(run: Path) -> float:
    return max(p.stat().st_mtime for p in store.published(run))


def _newest(path: Path) -> Path:
    found = store.published(path) if path.is_dir() else []
    if not found:
        what = "has no checkpoint and no config.json" if path.is_dir() else "does not exist"
        stages = sorted((p for p in path.glob("*") if store.published(p)), key=_newest_time)
        if stages:  # of a run with stages each is a run in a folder of its own
            raise CheckpointError(
                f"{path} has no checkpoint of its own, but those of its stages; needed: one of "
                f"{', '.join(str(p) for p in stages)}, of which {stages[-1]} is the last"
            )
        raise CheckpointError(
            f"{path} {what}; needed: the folder of a run with checkpoint.every set, a checkpoint, or a "
            "folder of published weights"
        )
    return found[-1]


def _published(folder: Path) -> WholeModel:
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"it has no {TOKENIZER}; llm.load_hf gives its model, which takes ids")
    tokenizer = make_tokenizer(str(folder))
    return WholeModel(load_hf(folder).model, {}, {}, tokenizer, tuple(tokenizer.begin), tokenizer.stops)


def _checkpoint(path: Path) -> WholeModel:
    wrong = store.structure(path)
    if wrong:
        raise store.BadCheckpoint(f"it is damaged: {'; '.join(wrong)}")
    state = store.read_state(path)
    if SINK in state:  # imported: a language model alone
        tokenizer = tokenizer_of(state, path)
        if tokenizer is None:
            raise ValueError(f"{path.parent / KEPT} is not there: it was imported without a tokenizer")
        llm = LLM(build(LLMConfig, state[SINK], "the checkpoint's llm"))
        _fill(path, {SINK: llm})
        return WholeModel(llm, {}, {}, tokenizer, tuple(tokenizer.begin), tokenizer.stops)
    blueprint = draw_up(_config(state, path), 1)
    stages = {m: blueprint.stages[m][0] for m in blueprint.modules}
    made = {m: bare_module(blueprint, m, Axes(), stage, "cpu") for m, stage in stages.items()}
    _fill(path, made)
    return _whole(blueprint, made)


def _config(state: Mapping[str, Any], path: Path) -> Config:
    """The run's config as one process has it."""
    given = with_kept(state["config"], path)
    raw = {**given, "layout": {}, "schedule": {**given["schedule"], **ONE_PROCESS}}
    llm = dict(raw["model"][SINK])
    if "pattern" in llm:
        llm["pattern"] = llm["pattern"].replace("|", "")  # stages of a pipeline
    raw["model"] = {**raw["model"], SINK: llm}
    return from_mapping(raw, path)


def _whole(blueprint: Blueprint, made: Mapping[str, nn.Module]) -> WholeModel:
    tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    encoders = {m: part for m, part in made.items() if isinstance(part, EncoderModule)}
    llm = made[SINK]
    assert isinstance(llm, LLM)
    stops = tokenizer.stops | {tokenizer.eos}
    return WholeModel(
        llm, encoders, blueprint.inputs.encoders, tokenizer, begin=(tokenizer.bos,), stops=stops
    )


def _fill(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Read all parameters and persistent buffers of whole modules."""
    tensors = {f"{m}.{key}": t for m, module in modules.items() for key, t in module_tensors(module).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is intended
        store.load(path, tensors)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    kept = precise_modules(module) if isinstance(module, LLM) else []
    precise = {id(p) for sub in kept for p in sub.parameters()}
    for param in module.parameters():
        if id(param) not in precise:
            param.data = param.data.to(dtype)
