"""Checks of what a run reads and writes, before any rank starts: starting ranks takes seconds."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mm.config.data import storage_of
from mm.config.outline import SINK, llm_config
from mm.config.schema import Config
from mm.config.sources import patterns_of
from mm.data.index import find_shards
from mm.data.layouts.find import Spec, layout_name
from mm.data.remote.stores import need_package
from mm.data.remote.urls import check_target, scheme_of
from mm.data.tokenizer import Tokenizer, make_tokenizer
from mm.data.tokenizer_files import KEPT
from mm.data.vocabulary import check_vocabulary
from mm.errors import CheckpointError, Refused
from mm.ranks.launch import restarted

CONFIG = "config.json"

if TYPE_CHECKING:
    from mm.data.sample import Index
    from mm.plan.blueprint import Blueprint


def check_paths(cfg: Config, *, write: bool = True, data: bool = True) -> None:
    """Refuse a run folder that cannot be written, missing data, and boards that are not installed.

    Needs no torch. write: make the run folder; otherwise nothing is written. Raises Refused or DataError.
    """
    folder = Path(cfg.run.dir)
    try:
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        else:
            _could_write(folder)
    except OSError as error:
        raise Refused(
            f"run.dir {folder} cannot be written: {error.strerror}; needed: a folder that can"
        ) from error
    for entries in (cfg.data.train, cfg.data.eval) if data else ():
        find_shards(patterns_of(entries), cfg.base, cfg.data.made_by, storage_of(cfg.data))
        _check_layouts([cfg.data.layout, *(e.layout for e in entries if not isinstance(e, str))])
    _check_boards(cfg)
    if cfg.checkpoint.remote.url is not None:
        check_target(cfg.checkpoint.remote.url)
        need_package(scheme_of(cfg.checkpoint.remote.url))


def _check_boards(cfg: Config) -> None:
    """Refuse a board whose package is not installed."""
    asked = {
        "tensorboard": ("run.tensorboard=true", "run.tensorboard=false") if cfg.run.tensorboard else None,
        "wandb": (f"run.wandb={cfg.run.wandb}", "run.wandb=null") if cfg.run.wandb is not None else None,
    }
    for package, said in asked.items():
        found = find_spec(package)  # without origin: a folder of that name that the package made
        if said is not None and (found is None or found.origin is None):
            raise Refused(
                f"{said[0]}, but the package {package} is not installed; needed: pip install -e "
                f"'.[{package}]', or {said[1]} (metrics.jsonl has the same numbers)"
            )


def _check_layouts(layouts: Sequence[Spec]) -> None:
    for layout in layouts:
        try:
            layout_name(layout)
        except ValueError as error:
            raise Refused(f"data.layout: {error}") from error


def _could_write(folder: Path) -> None:
    """Raise the OSError that making `folder` and a file in it would raise; makes nothing."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_start(cfg: Config) -> None:
    """Raise CheckpointError where what checkpoint.resume or checkpoint.weights names does not exist, and
    Refused where the weights, or the folder model.llm.preset, are of another vocabulary."""
    from mm.checkpoint.state import candidates, check_local
    from mm.checkpoint.weights import published_adapters
    from parallel.checkpoint import MANIFEST, published

    if restarted():  # it resumes from its own checkpoints; what it began from may be gone
        return
    candidates(cfg, Path(cfg.run.dir))
    for weights in cfg.checkpoint.starts:
        check_local("checkpoint.weights", weights)
        if not any((Path(weights) / name).is_file() for name in (MANIFEST, CONFIG)):
            inside = "".join(f"; its newest is {path.name}" for path in published(Path(weights))[-1:])
            raise CheckpointError(
                f"checkpoint.weights={weights} is neither a checkpoint (with a {MANIFEST}) nor a Hugging "
                f"Face folder (with a config.json){inside}"
            )
        if (Path(weights) / CONFIG).is_file():
            _check_tokens(cfg, Path(weights))
        else:
            _check_kept(cfg, Path(weights))
    published_adapters(cfg)
    _check_preset(cfg)


def _check_preset(cfg: Config) -> None:
    """Refuse a tokenizer of another vocabulary than that of the folder model.llm.preset, whatever weights the
    run starts from: the config.json of an export would go with tokens that it does not mean."""
    preset = cfg.llm.get("preset")
    if not isinstance(preset, str) or not Path(preset).is_dir():
        return
    try:
        check_vocabulary(cfg.data.tokenizer, Path(preset))
    except ValueError as error:
        raise Refused(
            f"model.llm.preset: {error}, or as model.llm.preset a folder with its config.json alone, for a "
            "model of these sizes with a vocabulary of its own"
        ) from error


def _check_tokens(cfg: Config, folder: Path) -> None:
    """Refuse published weights whose embedding is of other tokens or of another size."""
    try:
        rows = llm_config(cfg).vocab_size
        check_vocabulary(cfg.data.tokenizer, folder)
        published = json.loads((folder / CONFIG).read_text())
        there = {**published, **published.get("text_config", {})}.get("vocab_size", rows)
    except (ValueError, AttributeError) as error:
        raise Refused(f"checkpoint.weights: {error}") from error
    if there != rows:
        raise Refused(
            f"checkpoint.weights: {folder} embeds {there} tokens, model.llm.vocab_size is {rows}; "
            f"needed: model.llm.preset={folder}, or model.llm.vocab_size={there}"
        )


def _check_kept(cfg: Config, checkpoint: Path) -> None:
    """Refuse a checkpoint with a language model that was trained on the ids of another tokenizer."""
    from mm.checkpoint.state import tokenizer_of
    from parallel import checkpoint as store

    name = cfg.data.tokenizer
    try:
        state, tensors = store.read_state(checkpoint), store.describe(checkpoint)
        if not any(key.startswith(f"{SINK}.") for key in tensors):
            return
        kept = checkpoint.parent / KEPT
        if kept.is_dir():
            check_vocabulary(name, kept)
            return
        ours, theirs = make_tokenizer(name), tokenizer_of(state, checkpoint) if "config" in state else None
        if isinstance(theirs, Tokenizer) and not isinstance(ours, Tokenizer):
            raise Refused(
                f"checkpoint.weights: {checkpoint} was trained on bytes, data.tokenizer is {name}; needed: "
                "data.tokenizer=bytes, or weights of that tokenizer"
            )
    except store.BadCheckpoint:
        return  # what is damaged is named where it is read
    except ValueError as error:
        raise Refused(f"checkpoint.weights: {error}") from error


def check_fits(blueprint: Blueprint, index: Index) -> None:
    """Raise CheckpointError where the checkpoint or the weights to start from are of another model.

    Compares names and shapes alone, as a dry run must.
    """
    from mm.checkpoint.state import candidates, check_resume
    from mm.checkpoint.weights import check_weights

    cfg = blueprint.cfg
    resumed = candidates(cfg, Path(cfg.run.dir))[:1]
    for path in resumed:
        check_resume(blueprint, index, path)
    for start in cfg.checkpoint.starts if not resumed else ():
        check_weights(blueprint, Path(start))
