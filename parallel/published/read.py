"""Reads published tensors into a module's parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.published.files import SafeFolder
from parallel.published.tables import FileTensor, Part, Shape, parts_by_name
from parallel.sharding.dtypes import accumulation_dtype
from parallel.sharding.low_rank import is_adapter
from parallel.sharding.param import ParamSpec, declared, local
from parallel.sharding.shard import held_indices
from parallel.topology.mesh import ModuleMesh


def module_shapes(module: nn.Module) -> dict[str, Shape]:
    """Global shape of every parameter and persistent buffer of a module, by name."""
    return {name: tuple(t.shape) for name, t in module_tensors(module).items()}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a module, by name; DTensors where it is sharded."""
    return {name: t.detach() for name, t in module.state_dict(keep_vars=True).items()}


@torch.no_grad()
def read_into(
    module: nn.Module, tensors: Sequence[FileTensor], folder: SafeFolder, mesh: ModuleMesh | None = None
) -> None:
    """Fill `module` in place with published tensors, cast to its dtypes.

    tensors: of the whole module, checked against the folder (check_tensors); what none of them holds becomes
    zero (file_tensors). mesh: the mesh of shard_module(), where each rank reads only its shards; None for a
    whole module. A pipeline stage reads its own layers.
    """
    parts = parts_by_name(tensors)
    for name, target in module_tensors(module).items():
        if name not in parts and not is_adapter(name):  # which stays as it starts
            local(target).zero_()
    read_some(module, tensors, folder, mesh)


@torch.no_grad()
def read_some(
    module: nn.Module, tensors: Sequence[FileTensor], folder: SafeFolder, mesh: ModuleMesh | None = None
) -> None:
    """read_into() of some parameters; all others stay."""
    parts = parts_by_name(tensors)
    specs: dict[str, ParamSpec] = {name: spec for name, _, spec in declared(module)}
    for name, target in module_tensors(module).items():
        shape = tuple(target.shape)
        if name not in parts:
            continue
        if mesh is None or name not in specs:
            held = [torch.arange(n) for n in shape]
        else:
            held = held_indices(shape, specs[name], mesh)
        block = read_block(folder, parts[name], held, shape)
        shard = local(target)
        assert block.shape == shard.shape, (name, block.shape, shard.shape)
        shard.copy_(block)


def read_block(
    folder: SafeFolder, parts: list[tuple[FileTensor, Part]], held: list[Tensor], shape: Shape
) -> Tensor:
    """The block held[0] x held[1] x .. (global indices by dim) of a parameter of `shape`, read from its
    parts."""
    tensor, part = parts[0]
    if part.expert is None:
        assert len(parts) == 1, part.name
        shifted = [h * part.step + part.first if dim == tensor.dim else h for dim, h in enumerate(held)]
        if tensor.flipped:
            turned = _read(folder, tensor, [*shifted[:-2], shifted[-1], shifted[-2]], shape)
            return turned.transpose(-1, -2)
        return _read(folder, tensor, shifted, shape)
    experts = {p.expert: t for t, p in parts}
    rows = [_read(folder, experts[e], held[1:], shape[1:]) for e in held[0].tolist()]
    if rows:
        return torch.stack(rows)
    return torch.empty([len(h) for h in held], dtype=folder.dtype(tensor.key))


def _read(folder: SafeFolder, tensor: FileTensor, held: list[Tensor], shape: Shape) -> Tensor:
    """The block at indices `held` of a file's tensor; its dims after the first are those of `shape` here."""
    spans = [slice(int(h[0]), int(h[-1]) + 1) if len(h) else slice(0, 0) for h in held]
    if tensor.lead < 0:
        return folder.read(tensor.key, spans[1:])[None][spans[0]]
    lead = (slice(None),) * tensor.lead
    if tensor.dim == 0 and tensor.shape[tensor.lead + 1 :] != shape[1:]:
        # As many elements in other dims: all of these rows.
        block = folder.read(tensor.key, (*lead, *spans[:1]))
        block = block.reshape(spans[0].stop - spans[0].start, *shape[1:])[(slice(None), *spans[1:])]
    else:
        block = folder.read(tensor.key, (*lead, *spans))
        block = block.reshape(block.shape[tensor.lead :])
    for dim, h in enumerate(held):
        if len(h) != block.shape[dim]:
            block = block.index_select(dim, h - h[0])
    return block


def allocate(module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device | str) -> None:
    """Allocate every parameter and buffer of a module that is on the meta device; dtypes: by name. Buffers
    are zero, and float32 at least."""
    for prefix, sub in module.named_modules():
        stem = f"{prefix}." if prefix else ""
        for name, param in list(sub.named_parameters(recurse=False)):
            empty = torch.empty(param.shape, dtype=dtypes[stem + name], device=device)
            setattr(sub, name, nn.Parameter(empty, requires_grad=param.requires_grad))
        for name, buffer in list(sub.named_buffers(recurse=False)):
            kept = dtypes.get(stem + name)
            kind = buffer.dtype if kept is None else accumulation_dtype(kept)
            setattr(sub, name, torch.zeros(buffer.shape, dtype=kind, device=device))


def stored_dtypes(tensors: Sequence[FileTensor], folder: SafeFolder) -> dict[str, torch.dtype]:
    """dtype that the files have each parameter in, by name. Raises ValueError for quantised weights."""
    return {name: folder.dtype(held[0][0].key) for name, held in parts_by_name(tensors).items()}
