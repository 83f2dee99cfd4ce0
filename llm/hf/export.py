"""Writes a language model as a folder that transformers and others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.config import config_of, export_family
from llm.hf.stored import Stored
from llm.hf.weights import model_tensors
from llm.model import LLM
from parallel.published import (
    FILE_BYTES,
    Contents,
    Fetch,
    module_tensors,
    write_folder,
)


def save_hf(
    model: LLM,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    family: str | None = None,
) -> Path:
    """Write a whole, unsharded model to a new folder; see write_model()."""
    tensors = module_tensors(model)

    def fetch(names: Sequence[str]) -> dict[str, Tensor]:
        return {n: tensors[n] for n in names}

    return write_model(model.cfg, fetch, path, dtype, file_bytes, family)


def export_checkpoint(
    source: Path | Stored,
    path: str | Path,
    cfg: LLMConfig,
    *,
    name: str = "llm",
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    family: str | None = None,
) -> Path:
    """Write the language model of a distributed checkpoint, saved under any layout, to a new folder.

    source: a complete checkpoint (parallel.checkpoint); name: of the module in it, if `source` does not say.
    Runs in one process, which holds one parameter and one file at a time. See write_model().
    """
    stored = source if isinstance(source, Stored) else Stored(source, f"{name}.")
    return write_model(cfg, stored.fetch, path, dtype, file_bytes, family)


def write_model(
    cfg: LLMConfig,
    fetch: Fetch,
    path: str | Path,
    dtype: torch.dtype | None,
    file_bytes: int,
    family: str | None = None,
) -> Path:
    """Write a checkpoint of a model to the new folder `path`; see parallel.published.write_folder().

    dtype: of the tensors, None for their own; the routing bias is float32 at least. family: its model_type;
    None: see llm.hf.config.export_family(). Raises ValueError where the family cannot express the model too.
    """
    chosen = export_family(cfg, family)  # refuses what the table does not know
    tensors, shapes, zero = model_tensors(cfg, chosen)
    check_zero(zero, fetch, chosen.title)
    contents = Contents(
        tensors,
        shapes,
        config_of(chosen, cfg, "float32"),
        precise=lambda key: key.endswith("e_score_correction_bias"),
    )
    return write_folder(contents, fetch, path, dtype, file_bytes)


def check_zero(names: Sequence[str], fetch: Fetch, title: str) -> None:
    """Refuse parameters that files of `title` lack and that are not zero. Raises ValueError."""
    for name in names:
        if fetch([name])[name].any():
            raise ValueError(
                f"{name} is not zero, and a {title} checkpoint has no such tensor; needed: a model trained "
                "with expert_bias_rate=0"
            )
