"""Writes a folder that transformers and others read: config.json, safetensors files and their index."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from parallel.published.files import CONFIG, INDEX, WEIGHTS
from parallel.published.tables import FileTensor, Shape
from parallel.sharding.dtypes import accumulation_dtype

Fetch = Callable[[Sequence[str]], Mapping[str, Tensor]]
FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Contents:
    """What a folder of published weights holds, without the values."""

    tensors: Sequence[FileTensor]
    """In the order in which they are written."""
    shapes: Mapping[str, Shape]
    """Of the parameters, by name."""
    config: Mapping[str, Any]
    """config.json; it is given the dtype of the first tensor."""
    precise: Callable[[str], bool] = lambda _: False
    """Whether the tensor of a key is float32 at least."""


def new_folder(path: Path) -> Path:
    """Where the folder `path` is written until it is complete and gets its name; nothing is there yet.

    Raises ValueError where `path` exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists already; needed: the name of a new folder")
    partial = path.with_name(path.name + ".tmp")
    if partial.exists():
        shutil.rmtree(partial)
    return partial


def write_folder(
    contents: Contents, fetch: Fetch, path: str | Path, dtype: torch.dtype | None, file_bytes: int
) -> Path:
    """Write the tensors of a model to the new folder `path`, which appears when it is complete.

    fetch: gives whole parameters by name; called in file order, once for each. dtype: of the tensors, None
    for their own. file_bytes: a file is closed once it holds as many. Raises ValueError where the path
    exists, and where a parameter has another shape.
    """
    path = Path(path)
    partial = new_folder(path)
    partial.mkdir(parents=True)
    files = _Files(partial, file_bytes)
    for _, group in itertools.groupby(contents.tensors, lambda t: tuple(p.name for p in t.parts)):
        held = list(group)  # the experts of one parameter, or one tensor
        values = fetch([p.name for p in held[0].parts])
        for n, value in values.items():
            if tuple(value.shape) != contents.shapes[n]:
                raise ValueError(f"{n} has shape {list(value.shape)}, expected {list(contents.shapes[n])}")
        for tensor in held:
            value = join(tensor, values)
            if dtype is not None and value.is_floating_point():
                value = value.to(accumulation_dtype(dtype) if contents.precise(tensor.key) else dtype)
            files.add(tensor.key, value)
    said = str(files.dtypes[contents.tensors[0].key]).removeprefix("torch.")
    files.close()
    (partial / CONFIG).write_text(json.dumps({**contents.config, "torch_dtype": said}, indent=2) + "\n")
    os.replace(partial, path)
    return path


def join(tensor: FileTensor, values: Mapping[str, Tensor]) -> Tensor:
    """A file's tensor from the whole parameters in it."""
    parts = [values[p.name] if p.expert is None else values[p.name][p.expert] for p in tensor.parts]
    if tensor.parts[0].step > 1:
        whole = torch.stack(parts, tensor.dim + 1).flatten(tensor.dim, tensor.dim + 1)
    else:
        whole = torch.cat(parts, tensor.dim) if len(parts) > 1 else parts[0]
    if tensor.flipped:
        whole = whole.transpose(-1, -2)
    return whole.reshape(tensor.shape).contiguous()


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
