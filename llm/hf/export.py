"""Writes a folder that transformers and others read: config.json, safetensors files and their index."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.config import write_config
from llm.hf.files import CONFIG, INDEX, WEIGHTS
from llm.hf.weights import checkpoint_tensors, join, model_shapes, model_tensors
from llm.model import LLM
from parallel import checkpoint as checkpoint
from parallel.sharding.dtypes import accumulation_dtype

Fetch = Callable[[Sequence[str]], Mapping[str, Tensor]]
FILE_BYTES = 4 << 30


def save_hf(
    model: LLM, path: str | Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> Path:
    """Write a whole, unsharded model to a new folder; see write_folder()."""
    tensors = model_tensors(model)
    return write_folder(model.cfg, lambda names: {n: tensors[n] for n in names}, path, dtype, file_bytes)


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
    holds one parameter and one file at a time. See write_folder().
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

    return write_folder(cfg, fetch, path, dtype, file_bytes)


def write_folder(
    cfg: LLMConfig, fetch: Fetch, path: str | Path, dtype: torch.dtype | None, file_bytes: int
) -> Path:
    """Write a checkpoint of a model to the new folder `path`, which appears when it is complete.

    fetch: gives whole parameters by name; called in file order, once for each. dtype: of the tensors, None
    for their own; the routing bias is float32 at least. file_bytes: a file is closed once it holds as many.
    Raises ValueError where the format cannot express the model, where the path exists, and where a parameter
    has another shape than the config gives.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; needed: the name of a new folder")
    shapes = model_shapes(LLM(cfg, device="meta"))
    config = write_config(cfg, "float32")
    partial = path.with_name(path.name + ".tmp")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    files = _Files(partial, file_bytes)
    tensors = checkpoint_tensors(cfg)
    for _, group in itertools.groupby(tensors, lambda t: tuple(p.name for p in t.parts)):
        held = list(group)  # the experts of one parameter, or one tensor
        values = fetch([p.name for p in held[0].parts])
        for n, value in values.items():
            if tuple(value.shape) != shapes[n]:
                raise ValueError(f"{n} has shape {list(value.shape)}, expected {list(shapes[n])}")
        for tensor in held:
            value = join(tensor, values)
            files.add(tensor.key, value if dtype is None else value.to(_kept(tensor.key, dtype)))
    config["torch_dtype"] = str(files.dtypes[tensors[0].key]).removeprefix("torch.")
    files.close()
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, path)
    return path


def _kept(key: str, dtype: torch.dtype) -> torch.dtype:
    return accumulation_dtype(dtype) if key.endswith("e_score_correction_bias") else dtype


class _Files:
    """Safetensors files of about `limit` bytes, numbered once their number is known."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.pending: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.bytes = self.total = 0

    def add(self, key: str, value: Tensor) -> None:
        # A copy: rows of a stacked parameter share its memory, which safetensors refuses to write.
        self.pending[key] = value.detach().cpu().clone()
        self.dtypes[key] = value.dtype
        self.bytes += value.numel() * value.element_size()
        if self.bytes >= self.limit:
            self._flush()

    def close(self) -> None:
        if self.pending:
            self._flush()
        count = len(self.written)
        if count == 1:
            os.replace(self.folder / _part(0), self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for i, keys in enumerate(self.written):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / _part(i), self.folder / file)
            weight_map |= dict.fromkeys(keys, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self.pending, self.folder / _part(len(self.written)), metadata={"format": "pt"})
        self.written.append(list(self.pending))
        self.total += self.bytes
        self.pending, self.bytes = {}, 0


def _part(i: int) -> str:
    return f"part-{i}.safetensors"
