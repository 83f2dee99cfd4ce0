"""The whole model of a run, a checkpoint or a published folder, in one process, whatever layout it had."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.contract import Features, ItemBatch
from encoders.module import EncoderModule
from llm.config import LLMConfig
from llm.decode import Prompt, Sampling, decode
from llm.hf import load_hf
from llm.model import LLM, precise_modules
from mm.checkpoint.state import tokenizer_of
from mm.checkpoint.whole import one_process, read_whole
from mm.config.build import build
from mm.config.outline import SINK
from mm.containers.card import read_card
from mm.containers.registry import is_whole
from mm.data.published import TOKENIZER, PublishedTokenizer
from mm.data.tokenizer import AnyTokenizer, make_tokenizer
from mm.data.tokenizer_files import KEPT
from mm.errors import CheckpointError, Refused
from mm.plan.blueprint import Blueprint, bare_module, draw_up
from mm.plan.inputs import EncoderUse
from parallel import checkpoint as store
from parallel.published import module_tensors
from parallel.topology.axis import Axes


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
    def cfg(self) -> LLMConfig:
        """Of the language model."""
        return self.llm.cfg

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return next(self.llm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.llm.parameters()).device

    @torch.no_grad()
    def encode(self, module: str, batch: ItemBatch) -> Tensor:
        """The rows of items of a module [R, d], or [R, levels, d]."""
        found = self.encoders[module](batch)
        assert isinstance(found, Features)
        return found.values

    def decode(
        self, prompts: Sequence[Prompt], limit: int, sampling: Sampling, stops: Collection[int]
    ) -> Iterator[list[int | None]]:
        """llm.decode.decode() of the language model."""
        return decode(self.llm, prompts, limit, sampling, stops)

    def close(self) -> None:
        """Nothing: one process holds tensors alone."""


def load_whole(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> WholeModel:
    """The model of a run's folder (its newest checkpoint), of a checkpoint, or of a published folder.

    dtype: of the weights; None: as they are stored. Weights that keep their dtype in training keep it here.
    Raises CheckpointError where there is no model, or its files do not fit.
    """
    path = Path(path)
    try:
        found = _published(path) if is_folder(path) else _checkpoint(checkpoint_at(path))
        _check_ids(found)
    except (ValueError, KeyError, Refused) as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    for module in (found.llm, *found.encoders.values()):
        cast(module, dtype)
        module.to(device).eval().requires_grad_(False)
    return found


def _check_ids(model: WholeModel) -> None:
    """Raise ValueError where the tokenizer gives ids that the model does not embed."""
    if isinstance(model.tokenizer, PublishedTokenizer):
        ids = max(model.tokenizer.core.get_vocab().values(), default=-1) + 1
        if ids > model.cfg.vocab_size:
            raise ValueError(
                f"its tokenizer has {ids} ids, its model embeds {model.cfg.vocab_size}; needed: the "
                "tokenizer that the model was trained with"
            )


def _newest_time(run: Path) -> float:
    return max(p.stat().st_mtime for p in store.published(run))


def is_folder(path: Path) -> bool:
    """Whether it is a published folder, and no checkpoint."""
    return (path / "config.json").is_file() and not (path / store.MANIFEST).is_file()


def checkpoint_at(path: Path) -> Path:
    """A checkpoint, or the newest of a run's folder; raises CheckpointError where it has none."""
    if (path / store.MANIFEST).is_file():
        return path
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
    if is_whole(folder):
        blueprint, made = read_whole(folder)
        found = _whole(blueprint, made)
        card = read_card(folder) or {}
        begin = tuple(card.get("begin", tokenizer.begin))
        return replace(found, begin=begin, stops=tokenizer.stops)
    return WholeModel(load_hf(folder).model, {}, {}, tokenizer, tuple(tokenizer.begin), tokenizer.stops)


def _checkpoint(path: Path) -> WholeModel:
    state = store.sound_state(path, store.structure)
    if SINK in state:  # imported: a language model alone
        tokenizer = tokenizer_of(state, path)
        if tokenizer is None:
            raise ValueError(f"{path.parent / KEPT} is not there: it was imported without a tokenizer")
        llm = LLM(build(LLMConfig, state[SINK], "the checkpoint's llm"))
        fill(path, [(SINK, llm)])
        return WholeModel(llm, {}, {}, tokenizer, tuple(tokenizer.begin), tokenizer.stops)
    blueprint = draw_up(one_process(state, path), 1)
    stages = {m: blueprint.stages[m][0] for m in blueprint.modules}
    made = {m: bare_module(blueprint, m, Axes(), stage, "cpu") for m, stage in stages.items()}
    fill(path, list(made.items()))
    return _whole(blueprint, made)


def _whole(blueprint: Blueprint, made: Mapping[str, nn.Module]) -> WholeModel:
    tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    encoders = {m: part for m, part in made.items() if isinstance(part, EncoderModule)}
    llm = made[SINK]
    assert isinstance(llm, LLM)
    stops = tokenizer.stops | {tokenizer.eos}
    return WholeModel(
        llm, encoders, blueprint.inputs.encoders, tokenizer, begin=(tokenizer.bos,), stops=stops
    )


def fill(path: Path, parts: Sequence[tuple[str, nn.Module]]) -> None:
    """Read all parameters and persistent buffers of modules, or of what a rank holds of them, by name."""
    tensors = {f"{m}.{key}": t for m, part in parts for key, t in module_tensors(part).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")  # one process may be intended
        store.load(path, tensors)


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert the weights of a module, but those that keep their dtype in training; None: convert none."""
    if dtype is None:
        return
    kept = precise_modules(module) if isinstance(module, LLM) else []
    precise = {id(p) for sub in kept for p in sub.parameters()}
    for param in module.parameters():
        if id(param) not in precise:
            param.data = param.data.to(dtype)
