"""Reads published tensors of a language model, whole or sharded."""

from __future__ import annotations

import torch

from llm.config import LLMConfig
from llm.hf.config import check_same, read_config
from llm.hf.family import Family
from llm.hf.inside import HEAD, language_part
from llm.hf.registry import family_named
from llm.model import LLM
from parallel.published import (
    FileTensor,
    SafeFolder,
    Shape,
    check_tensors,
    file_tensors,
    module_shapes,
    read_into,
    stored_dtypes,
)
from parallel.topology.mesh import ModuleMesh


def model_tensors(cfg: LLMConfig, family: Family) -> tuple[list[FileTensor], dict[str, Shape], list[str]]:
    """The tensors of a model's files, the shapes of its parameters, and names of what the files lack."""
    shapes = module_shapes(LLM(cfg, device="meta"))
    zero = [] if family.selection_bias else [n for n in shapes if n.endswith(".expert_bias")]
    return file_tensors(family.rows(cfg), shapes, zero), shapes, zero


def checkpoint_tensors(cfg: LLMConfig, family: str | None = None) -> list[FileTensor]:
    """The tensors of a published checkpoint of this model; family: None for its own."""
    return model_tensors(cfg, family_named(family or (cfg.source.family if cfg.source else "nemotron_h")))[0]


def check_folder(cfg: LLMConfig, folder: SafeFolder) -> tuple[list[FileTensor], SafeFolder]:
    """The tensors of a folder, and the folder under the keys of its family's table.

    A whole model may have other parts beside it. Raises ValueError unless it holds this model. Reads no data
    but of a head beside a tied embedding.
    """
    folder = language_part(folder)
    published = read_config(folder.config())
    check_same(cfg, published)
    assert published.source is not None
    family = family_named(published.source.family)
    tensors = model_tensors(cfg, family)[0]
    view = _by_table(family, published, folder)
    check_tensors(tensors, view.shapes(), str(folder.path))
    stored_dtypes(tensors, view)  # refuses quantised weights, whose bits are no numbers
    return tensors, view


def load_weights(model: LLM, folder: SafeFolder, mesh: ModuleMesh | None = None) -> None:
    """Fill `model` in place with published weights, cast to its dtypes.

    mesh: the mesh of shard_module(), where each rank reads only its shards; None for a whole model. A
    pipeline stage reads its own layers. Raises ValueError, before it reads any weight, where the folder's
    config describes another model, and where a tensor is missing, unknown or of another shape.
    """
    tensors, view = check_folder(model.cfg, folder)
    read_into(model, tensors, view, mesh)


def _by_table(family: Family, cfg: LLMConfig, folder: SafeFolder) -> SafeFolder:
    """The folder without what is no weight of the model, its keys with the stem in front."""
    keys = folder.shapes()
    bare = not any(key.startswith(family.stem) for key in keys)
    names = {key: key if key == HEAD or not bare else family.stem + key for key in keys}
    names = {key: name for key, name in names.items() if not family.ignored(name, cfg)}
    if cfg.tied and HEAD in names and family.embedding in names.values():
        _check_tied(folder, next(key for key, name in names.items() if name == family.embedding))
        del names[HEAD]
    return folder.renamed(names)


ROWS = 4096


def _check_tied(folder: SafeFolder, embedding: str) -> None:
    """Refuse a head that is not the embedding though config.json ties them; transformers unties it then."""
    shapes = folder.shapes()
    rows = range(0, shapes[HEAD][0], ROWS)
    if shapes[HEAD] == shapes[embedding] and all(
        torch.equal(*(folder.read(key, [slice(i, i + ROWS)]) for key in (HEAD, embedding))) for i in rows
    ):
        return
    raise ValueError(
        f"{folder.path} holds a {HEAD} that differs from {embedding}, though its config.json ties them; "
        "needed: tie_word_embeddings=false in config.json, or no such tensor"
    )
