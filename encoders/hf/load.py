"""Encoders with published weights: as a module of their own, and inside a job's module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.contract import Encoder
from encoders.hf.folder import Opened, open_folder
from encoders.module import EncoderModule
from parallel.published import allocate, read_into
from parallel.published.read import stored_dtypes
from parallel.topology.axis import Axes
from parallel.topology.mesh import ModuleMesh


class Published(nn.Module):
    """An encoder with published weights, in one process.

    encoder: the encoder; train it as any other.
    unused: keys of the folder that were not read, of other parts of a whole model or of a head.
    """

    def __init__(self, encoder: Encoder, opened: Opened) -> None:
        super().__init__()
        self.encoder, self.unused, self._features = encoder, opened.unused, opened.family.features

    def features(self, inputs: Mapping[str, Any]) -> Tensor:
        """The last hidden state as the transformers class of the family gives it.

        inputs: what the family's processor gives (pixel_values, image_grid_thw, input_features, ..).
        """
        return self._features(self.encoder, inputs)

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.features(inputs)


def load_hf(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Published:
    """The encoder of a folder with config.json and *.safetensors, of its own or of a whole model.

    dtype: of all weights, None for that of each tensor in the files. Raises ValueError for an unknown family,
    for options that ours cannot have, and for tensors that are missing, unknown or of another shape.
    """
    opened = open_folder(path)
    encoder = opened.cls(opened.cfg, Axes(), device="meta", dtype=None)
    stored = stored_dtypes(opened.tensors, opened.part.folder)
    allocate(encoder, {name: dtype or stored[name] for name in stored}, device)
    read_into(encoder, opened.tensors, opened.part.folder)
    return Published(encoder, opened)


def fill(module: EncoderModule, opened: Opened, mesh: ModuleMesh | None = None) -> None:
    """Fill the encoder of a job's module in place, cast to its dtypes; the projector stays as it is.

    mesh: the mesh of shard_module(), where each rank reads only its shards; None for a whole module. A
    pipeline stage reads its own layers, and a module with fewer layers the first ones.
    """
    read_into(module.encoder, opened.tensors, opened.part.folder, mesh)
