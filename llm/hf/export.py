"""Writes a language model as a folder that transformers and others read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.config import write_config
from llm.hf.keys import table_rows
from llm.model import LLM
from parallel import checkpoint as checkpoint
from parallel.published import (
    FILE_BYTES,
    Contents,
    Fetch,
    file_tensors,
    module_shapes,
    module_tensors,
    write_folder,
)


def save_hf(
    model: LLM, path: str | Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> Path:
    """Write a whole, unsharded model to a new folder; see write_model()."""
    tensors = module_tensors(model)
    return write_model(model.cfg, lambda names: {n: tensors[n] for n in names}, path, dtype, file_bytes)


def export_checkpoint(
    source: Path,
    path: str | Path,
    cfg: LLMConfig,
    *,
    name: str = "llm",
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the language model of a distributed checkpoint, saved under any layout, to a new folder.

    source: a complete checkpoint (parallel.checkpoint); name: of the module in it. Runs in one process, which
    holds one parameter and one file at a time. See write_model().
    """
    stored = checkpoint.describe(source)

    def fetch(names: Sequence[str]) -> dict[str, Tensor]:
        out = {}
        for n in names:
            if f"{name}.{n}" not in stored:
                raise ValueError(f"{source} has no {name}.{n}, which a model of this config has")
            shape, kind = stored[f"{name}.{n}"]
            out[n] = torch.empty(shape, dtype=kind)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ")  # one process is intended
            checkpoint.load(source, {f"{name}.{n}": t for n, t in out.items()})
        return out

    return write_model(cfg, fetch, path, dtype, file_bytes)


def write_model(
    cfg: LLMConfig, fetch: Fetch, path: str | Path, dtype: torch.dtype | None, file_bytes: int
) -> Path:
    """Write a checkpoint of a model to the new folder `path`; see parallel.published.write_folder().

    dtype: of the tensors, None for their own; the routing bias is float32 at least. Raises ValueError where
    the format cannot express the model too.
    """
    config = write_config(cfg, "float32")  # refuses what the table does not know
    shapes = module_shapes(LLM(cfg, device="meta"))
    contents = Contents(
        file_tensors(table_rows(cfg), shapes),
        shapes,
        config,
        precise=lambda key: key.endswith("e_score_correction_bias"),
    )
    return write_folder(contents, fetch, path, dtype, file_bytes)
