"""What is known of a published family of encoders: how its folders are read, and what it is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from encoders.contract import Encoder
from parallel.published import Row, SafeFolder, Shape

Rows = list[tuple[Row, str, str]]
"""Each with the prefix of its key there and of its parameters here (parallel.published.file_tensors)."""


@dataclass(frozen=True)
class Part:
    """The encoder's part of a folder.

    config: its section of config.json.
    processor: of preprocessor_config.json or processor_config.json; empty where the folder has none.
    prefix: what the keys of its tensors begin with.
    folder: the whole folder.
    """

    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    prefix: str
    folder: SafeFolder

    @property
    def whole(self) -> Mapping[str, Any]:
        """config.json of the whole folder."""
        return self.folder.config()

    def shapes(self) -> dict[str, Shape]:
        """Shape of each of its tensors, by key without the prefix."""
        n = len(self.prefix)
        return {k[n:]: s for k, s in self.folder.shapes().items() if k.startswith(self.prefix)}

    def field(self, name: str, default: Any) -> Any:
        """A field of the config; the default where it is absent or null."""
        value = self.config.get(name)
        return default if value is None else value


@dataclass(frozen=True)
class Family:
    """A family of published encoders.

    encoder: the name that it is registered under.
    model_types: model_type in its own config, and in that of whole models that it is a part of.
    probe: the key of a tensor that every folder has, without a prefix: it tells the prefix.
    options: of an encoder's Config, from a folder's part. Raises ValueError for what ours cannot be.
    rows: the table of its tensors, for an encoder of these options.
    unused: patterns of keys, without the prefix, that the last hidden state does not depend on.
    features: the last hidden state as the transformers class gives it, from what its processor gives.
    free: options that a config may give otherwise than the folder, as they change no tensor.
    spellings: patterns in keys, without the prefix, and how the table writes them: folders differ.
    """

    encoder: str
    model_types: tuple[str, ...]
    probe: str
    options: Callable[[Part], dict[str, Any]]
    rows: Callable[[Any], Rows]
    unused: tuple[str, ...]
    features: Callable[[Encoder, Mapping[str, Any]], Tensor]
    free: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
