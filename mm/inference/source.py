"""Where a model to use comes from: a run, a checkpoint or a published folder, and the config that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm.checkpoint.state import with_kept
from mm.checkpoint.weights import fill_encoders, start_from
from mm.checkpoint.whole import one_process
from mm.config.outline import SINK
from mm.config.schema import Config, from_mapping, load_config, override, resolve
from mm.config.sources import moved
from mm.containers.registry import is_whole
from mm.data.published import TOKENIZER
from mm.data.tokenizer_files import KEPT
from mm.errors import CheckpointError, Refused
from mm.inference.asked import Asked
from mm.inference.spread import load_spread
from mm.inference.whole import checkpoint_at, is_folder, load_whole
from mm.plan.blueprint import Blueprint
from mm.ranks.job import Job
from mm.ranks.launch import RankInfo
from parallel import checkpoint as store


@dataclass(frozen=True)
class Source:
    """path: of a checkpoint or a published folder. cfg: what it is evaluated under."""

    path: Path
    cfg: Config
    folder: bool
    """Whether it is a published folder."""

    def fill(self, job: Job) -> None:
        """Fill a job's modules; every rank calls this. Raises CheckpointError."""
        if self.folder:
            fill_encoders(job)
        start_from(job, [Path(p) for p in self.cfg.checkpoint.starts] if self.folder else [self.path])

    def model(self, blueprint: Blueprint, rank: RankInfo, dtype: torch.dtype | None = None) -> Asked:
        """The model to ask; every rank calls this. dtype: of the weights; None: as they are stored."""
        if rank.world == 1:
            return load_whole(self.path, dtype, rank.device)
        return load_spread(self.path, blueprint, rank, dtype)


def check_layout(path: Path, world: int) -> None:
    """Raise Refused where what is at `path` cannot be asked over so many ranks."""
    if is_folder(path) and world > 1:
        raise Refused(f"{path} is a published folder, which has no layout; needed: one process, or a run")


def source_of(path: Path, overrides: Sequence[str], world: int) -> Source:
    """A model's path and config on so many ranks: those of its run, or on one process without a layout.

    overrides: key=value. Raises CheckpointError and Refused.
    """
    if is_folder(path):
        try:
            return Source(path, _config_of_folder(path, overrides), folder=True)
        except ValueError as error:
            raise CheckpointError(f"cannot load {path}: {error}") from error
    checkpoint = checkpoint_at(path)
    try:
        state = store.sound_state(checkpoint, store.structure)
    except ValueError as error:
        raise CheckpointError(f"cannot load {checkpoint}: {error}") from error
    if SINK in state:
        if world > 1:
            raise Refused(f"{checkpoint} was imported, without a layout; needed: one process")
        return Source(checkpoint, _config_of_imported(checkpoint, state[SINK], overrides), folder=False)
    raw = with_kept(state["config"], checkpoint)
    if world == 1:
        raw = resolve(one_process(state, checkpoint))
    raw["data"] = {**raw["data"], **_data_of(checkpoint.parent)}
    for text in overrides:
        override(raw, text)
    return Source(checkpoint, from_mapping(raw, Path.cwd()), folder=False)


def _data_of(run: Path) -> dict[str, list[str | dict[str, Any]]]:
    """The data of a run, from its config.yaml, whose paths start in its folder; none where that is gone."""
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    data = load_config(file).data
    return {
        "train": moved(data.train, lambda p: str(run.absolute() / p)),
        "eval": moved(data.eval, lambda p: str(run.absolute() / p)),
    }


def _config_of_imported(checkpoint: Path, llm: dict[str, Any], overrides: Sequence[str]) -> Config:
    """That of an imported language model. llm: its options."""
    kept = checkpoint.parent / KEPT
    if not kept.is_dir():
        raise Refused(
            f"{checkpoint} was imported without a tokenizer; needed: one from a folder that has {TOKENIZER}"
        )
    return _evaluated({"model": {SINK: llm}, "data": {"tokenizer": str(kept)}}, overrides)


def _config_of_folder(folder: Path, overrides: Sequence[str]) -> Config:
    raw: dict[str, Any] = {}
    if is_whole(folder):
        raw |= {"model": {"folder": str(folder)}, "data": {}}
    else:
        raw |= {"model": {SINK: {"preset": str(folder)}}, "checkpoint": {"weights": str(folder)}}
        raw["data"] = {"tokenizer": str(folder)} if (folder / TOKENIZER).is_file() else {}
    return _evaluated(raw, overrides)


def _evaluated(raw: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The config of a model that was not trained here. raw: its sections model, data and checkpoint."""
    raw["train"] = {"steps": 1, "global_batch": 8, "dtype": "float32"}
    for text in overrides:
        override(raw, text)
    raw["data"].setdefault("train", raw["data"].get("eval", ["none"]))  # nothing is trained
    return from_mapping(raw, Path.cwd())
