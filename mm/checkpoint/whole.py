"""Whole models in one process: the config of a checkpoint as one process has it, folders of containers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from encoders.hf import open_folder
from encoders.hf.own import is_own, open_own
from encoders.module import EncoderModule
from llm.hf.weights import check_folder
from llm.model import LLM
from mm.checkpoint.state import with_kept
from mm.config.outline import SINK
from mm.config.schema import Config, from_mapping
from mm.containers.registry import projector_of
from mm.plan.blueprint import Blueprint, bare_module, draw_up
from mm.plan.whole import tower_of
from parallel.published import (
    FileTensor,
    SafeFolder,
    allocate,
    read_into,
    stored_dtypes,
)
from parallel.topology.axis import Axes
from parallel.topology.mesh import ModuleMesh

# What a run computed under is nothing to one process.
ONE_PROCESS: dict[str, Any] = {
    "kind": "auto",
    "ahead": None,
    "encoder_batch": {},
    "overlap_experts": False,
    "microbatches": 1,
}


def one_process(state: Mapping[str, Any], path: Path) -> Config:
    """The config of a checkpoint's run as one process has it. state: of the checkpoint at `path`."""
    given = with_kept(state["config"], path)
    raw = {**given, "layout": {}, "schedule": {**given["schedule"], **ONE_PROCESS}}
    llm = dict(raw["model"][SINK])
    if "pattern" in llm:
        llm["pattern"] = llm["pattern"].replace("|", "")  # stages of a pipeline
    raw["model"] = {**raw["model"], SINK: llm}
    return from_mapping(raw, path)


def read_whole(folder: Path, device: torch.device | str = "cpu") -> tuple[Blueprint, dict[str, nn.Module]]:
    """The model of a container's folder, or of one with a card: its blueprint on one process, its modules.

    Weights have the dtypes of the files. Raises ValueError or Refused where the folder is of no known
    container, or its files do not fit.
    """
    raw = {
        "model": {"folder": str(folder)},
        "data": {"train": [str(folder)]},  # nothing is read from it
        "train": {"steps": 1, "global_batch": 1},
    }
    blueprint = draw_up(from_mapping(raw, folder), 1)
    modules = {}
    for m in blueprint.modules:
        made = bare_module(blueprint, m, Axes(), blueprint.stages[m][0])
        parts = _parts(blueprint, m, made, folder)
        dtypes: dict[str, torch.dtype] = {}
        for _, before, tensors, files in parts:
            dtypes |= {before + n: kind for n, kind in stored_dtypes(tensors, files).items()}
        allocate(made, dtypes, device)
        for inner, _, tensors, files in parts:
            read_into(inner, tensors, files)
        modules[m] = made
    return blueprint, modules


def _parts(blueprint: Blueprint, name: str, module: nn.Module, folder: Path) -> list[_Source]:
    """What a module is read from, part by part."""
    if isinstance(module, LLM):
        return [_Source(module, "", *check_folder(module.cfg, SafeFolder(folder)))]
    assert isinstance(module, EncoderModule)
    return _encoder_sources(module, blueprint, name)


def _encoder_sources(module: EncoderModule, blueprint: Blueprint, name: str) -> list[_Source]:
    """What an encoder's module is read from, of what its config names folders for."""
    enc, use = blueprint.cfg.model[name], blueprint.inputs.encoders[name]
    if enc.weights is None:
        return _projectors(module, blueprint, name)
    if is_own(enc.weights):
        tensors, files = open_own(enc.weights, enc.encoder, use.cls, use.cfg)
    else:
        opened = open_folder(enc.weights, enc.encoder)
        tensors, files = opened.tensors, opened.part.folder
    return [_Source(module.encoder, "encoder.", tensors, files), *_projectors(module, blueprint, name)]


def _projectors(module: EncoderModule, blueprint: Blueprint, name: str) -> list[_Source]:
    """What the projectors of a module are read from; nothing where its config names no folder, and on stages
    that have none."""
    weights = blueprint.cfg.model[name].projector.weights
    if weights is None or module.projector is None:
        return []
    tower, width = tower_of(blueprint, name), blueprint.llm.d_model
    nets: dict[str, nn.Module] = {"projector.": module.projector}
    nets |= {f"level_projectors.{i}.": net for i, net in enumerate(module.level_projectors)}
    return [
        _Source(net, before, *projector_of(weights, name, tower, width, level))
        for level, (before, net) in enumerate(nets.items())
    ]


class _Source(NamedTuple):
    """A part of a module, the prefix of its parameters in it, its tensors in files, and the files."""

    part: nn.Module
    before: str
    tensors: Sequence[FileTensor]
    files: SafeFolder


def fill_encoder(
    module: EncoderModule, blueprint: Blueprint, name: str, mesh: ModuleMesh | None = None
) -> None:
    """Fill the encoder and the projector of a job's module from the folders that its config names, if any.

    mesh: of shard_module(), where each rank reads only its shards; None for a whole module. A pipeline stage
    reads its own layers, and an encoder with fewer layers the first ones. Raises ValueError where a folder
    does not fit.
    """
    for source in _encoder_sources(module, blueprint, name):
        read_into(source.part, source.tensors, source.files, mesh)
