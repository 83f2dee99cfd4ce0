"""Reads published tensors of a language model, whole or sharded."""

from __future__ import annotations

from llm.config import LLMConfig
from llm.hf.config import check_same, read_config
from llm.hf.keys import table_rows
from llm.model import LLM
from parallel.published import FileTensor, SafeFolder, check_tensors, file_tensors, module_shapes, read_into
from parallel.published.read import stored_dtypes
from parallel.topology.mesh import ModuleMesh


def checkpoint_tensors(cfg: LLMConfig) -> list[FileTensor]:
    """The tensors of a published checkpoint of this model."""
    return file_tensors(table_rows(cfg), module_shapes(LLM(cfg, device="meta")))


def check_folder(cfg: LLMConfig, folder: SafeFolder) -> list[FileTensor]:
    """The tensors of a folder. Raises ValueError unless it holds this model. Reads no tensor data."""
    check_same(cfg, read_config(folder.config()))
    tensors = checkpoint_tensors(cfg)
    check_tensors(tensors, folder.shapes(), str(folder.path))
    stored_dtypes(tensors, folder)  # refuses quantised weights, whose bits are no numbers
    return tensors


def load_weights(model: LLM, folder: SafeFolder, mesh: ModuleMesh | None = None) -> None:
    """Fill `model` in place with published weights, cast to its dtypes.

    mesh: the mesh of shard_module(), where each rank reads only its shards; None for a whole model. A
    pipeline stage reads its own layers. Raises ValueError, before it reads any weight, where the folder's
    config describes another model, and where a tensor is missing, unknown or of another shape.
    """
    read_into(model, check_folder(model.cfg, folder), folder, mesh)
