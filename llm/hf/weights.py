"""Reads published tensors into a model's parameters, whole or sharded, and joins them for writing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.hf.config import check_same, read_config
from llm.hf.files import SafeFolder
from llm.hf.keys import FileTensor, Part, Shape, file_tensors
from llm.model import LLM
from parallel.sharding.param import ParamSpec, declared, local
from parallel.sharding.shard import held_indices
from parallel.topology.mesh import ModuleMesh


def checkpoint_tensors(cfg: LLMConfig) -> list[FileTensor]:
    """The tensors of a published checkpoint of this model."""
    return file_tensors(cfg, model_shapes(LLM(cfg, device="meta")))


def model_shapes(model: nn.Module) -> dict[str, Shape]:
    """Global shape of every parameter and persistent buffer of a model, by name."""
    return {name: tuple(t.shape) for name, t in model_tensors(model).items()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a model, by name; DTensors where it is sharded."""
    return {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}


def check_tensors(needed: Sequence[FileTensor], given: Mapping[str, Shape], where: str) -> None:
    """Raise ValueError unless `given`, by key, are exactly the tensors needed, with their shapes."""
    shapes = {t.key: t.shape for t in needed}
    wrong = [f"missing: {_some(shapes.keys() - given.keys())}"] if shapes.keys() - given.keys() else []
    if given.keys() - shapes.keys():
        wrong.append(f"unknown: {_some(given.keys() - shapes.keys())}")
    wrong += [
        f"{key} has shape {list(given[key])}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in given and given[key] != shape
    ][:LISTED]
    if wrong:
        raise ValueError(
            f"{where} is not a checkpoint of the model that its config describes. " + "; ".join(wrong)
        )


LISTED = 20


def _some(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def check_folder(cfg: LLMConfig, folder: SafeFolder) -> list[FileTensor]:
    """The tensors of a folder. Raises ValueError unless it holds this model. Reads no tensor data."""
    check_same(cfg, read_config(folder.config()))
    tensors = checkpoint_tensors(cfg)
    check_tensors(tensors, folder.shapes(), str(folder.path))
    for tensor in tensors:
        folder.dtype(tensor.key)  # refuses quantised weights, whose bits are no numbers
    return tensors


@torch.no_grad()
def load_weights(model: LLM, folder: SafeFolder, mesh: ModuleMesh | None = None) -> None:
    """Fill `model` in place with published weights, cast to its dtypes.

    mesh: the mesh of shard_module(), where each rank reads only its shards; None for a whole model. A
    pipeline stage reads its own layers. Raises ValueError, before it reads any weight, where the folder's
    config describes another model, and where a tensor is missing, unknown or of another shape.
    """
    tensors = check_folder(model.cfg, folder)
    parts = parts_by_name(tensors)
    specs: dict[str, ParamSpec] = {name: spec for name, _, spec in declared(model)}
    for name, target in model_tensors(model).items():
        shape = tuple(target.shape)
        if mesh is None or name not in specs:
            held = [torch.arange(n) for n in shape]
        else:
            held = held_indices(shape, specs[name], mesh)
        block = read_block(folder, parts[name], held)
        shard = local(target)
        assert block.shape == shard.shape, (name, block.shape, shard.shape)
        shard.copy_(block)


def parts_by_name(tensors: Sequence[FileTensor]) -> dict[str, list[tuple[FileTensor, Part]]]:
    """By parameter: the tensors that hold it, each with its part of that tensor."""
    out: dict[str, list[tuple[FileTensor, Part]]] = defaultdict(list)
    for tensor in tensors:
        for part in tensor.parts:
            out[part.name].append((tensor, part))
    return out


def read_block(folder: SafeFolder, parts: list[tuple[FileTensor, Part]], held: list[Tensor]) -> Tensor:
    """The block held[0] x held[1] x .. (global indices by dim) of a parameter, read from its parts."""
    tensor, part = parts[0]
    if part.expert is None:
        assert len(parts) == 1, part.name
        return _read(folder, tensor, [held[0] + part.first, *held[1:]])
    experts = {p.expert: t for t, p in parts}
    rows = [_read(folder, experts[e], held[1:]) for e in held[0].tolist()]
    if rows:
        return torch.stack(rows)
    return torch.empty([len(h) for h in held], dtype=folder.dtype(tensor.key))


def _read(folder: SafeFolder, tensor: FileTensor, held: list[Tensor]) -> Tensor:
    """The block at indices `held` of a file's tensor, without the dims of size 1 that the parameter lacks."""
    spans = [slice(int(h[0]), int(h[-1]) + 1) if len(h) else slice(0, 0) for h in held]
    extra = len(tensor.shape) - len(held)
    block = folder.read(tensor.key, [spans[0], *[slice(0, 1)] * extra, *spans[1:]])
    block = block.reshape([s.stop - s.start for s in spans])
    for dim, h in enumerate(held):
        if len(h) != block.shape[dim]:
            block = block.index_select(dim, h - h[0])
    return block


def join(tensor: FileTensor, values: Mapping[str, Tensor]) -> Tensor:
    """A file's tensor from the whole parameters in it."""
    parts = [values[p.name] if p.expert is None else values[p.name][p.expert] for p in tensor.parts]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(tensor.shape).contiguous()
