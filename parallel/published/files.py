"""A folder of safetensors files, read by slices. Nothing is unpickled."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
UNREADABLE = (OSError, ValueError, RecursionError)  # what files raise that are no JSON, or nested too deep


class SafeFolder:
    """The tensors of a folder: one file, or several with an index. Reads headers first, data on demand."""

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError, by name, for a folder, file or tensor that is missing."""
        self.path = Path(path)
        self._config: Mapping[str, Any] | None = None
        if not self.path.is_dir():
            raise ValueError(f"{path} is no folder; needed: one with {CONFIG} and *.safetensors")
        # safetensors has no types for what safe_open gives and its slices.
        self._slices: dict[str, Any] = {}
        self._files: list[Any] = []
        for file, wanted in self._layout().items():
            opened = _open(self.path / file)
            keys = set(opened.keys())
            lacking = sorted(set(wanted) - keys) if wanted is not None else []
            if lacking:
                raise ValueError(f"{INDEX} says that {file} holds {lacking[0]}, which it does not")
            self._files.append(opened)
            self._slices |= {key: opened.get_slice(key) for key in (keys if wanted is None else wanted)}

    def _layout(self) -> dict[str, list[str] | None]:
        """File names, and which tensors are taken from each; None for all of them."""
        index = self.path / INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                assert all(isinstance(file, str) for file in weight_map.values())
            except (*UNREADABLE, LookupError, TypeError, AttributeError, AssertionError) as error:
                raise ValueError(f"{index} is no index of safetensors files: {error!r}") from error
            out: dict[str, list[str] | None] = {}
            for key, file in weight_map.items():
                if Path(file).name != file:
                    raise ValueError(f"{index} points outside its folder: {file}")
                out.setdefault(file, [])
                held = out[file]
                assert held is not None
                held.append(key)
            return out
        if (self.path / WEIGHTS).exists():
            return {WEIGHTS: None}
        pickled = sorted(p.name for p in self.path.glob("*.bin"))
        hint = f"; {pickled[0]} is pickled and is not read, convert it first" if pickled else ""
        raise ValueError(f"{self.path} has neither {WEIGHTS} nor {INDEX}; needed: the whole folder{hint}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {key: tuple(s.get_shape()) for key, s in self._slices.items()}

    def dtype(self, key: str) -> torch.dtype:
        """dtype of a tensor. Raises ValueError where torch cannot compute in it (quantised weights)."""
        name = self._slices[key].get_dtype()
        if name not in DTYPES:
            raise ValueError(f"{key} is stored as {name}; needed: one of {', '.join(DTYPES)}")
        return DTYPES[name]

    def read(self, key: str, index: Sequence[slice]) -> Tensor:
        """A block of a tensor; only its bytes are read."""
        block: Tensor = self._slices[key][tuple(index) if index else ...]
        return block

    def renamed(self, names: Mapping[str, str]) -> SafeFolder:
        """The same files under other keys; names: by key, those of the tensors that are left."""
        if all(key == name for key, name in names.items()) and names.keys() == self._slices.keys():
            return self
        return self.with_slices({name: self._slices[key] for key, name in names.items()})

    def slices(self) -> Mapping[str, Any]:
        """What each tensor is read through: get_shape(), get_dtype(), and blocks by slices."""
        return self._slices

    def with_slices(self, slices: Mapping[str, Any]) -> SafeFolder:
        """The same files with these tensors."""
        out = copy.copy(self)
        out._slices = dict(slices)
        return out

    def part(self, names: Mapping[str, str], config: Mapping[str, Any]) -> SafeFolder:
        """A part of a whole model as a folder of its own: renamed(names), with the part's config.json."""
        out = copy.copy(self.renamed(names))
        out._config = config
        return out

    def config(self) -> Mapping[str, Any]:
        """config.json, or that of a part."""
        if self._config is not None:
            return self._config
        file = self.path / CONFIG
        try:
            config = json.loads(file.read_text())
        except UNREADABLE as error:
            raise ValueError(f"{file} is missing or unreadable: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds no object but {type(config).__name__}")
        return config


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is missing or no safetensors file ({error}); needed: the whole folder"
        ) from error
