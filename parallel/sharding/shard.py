"""Sharding a module over its mesh, and making its initial weights shard by shard.

Weights declared with a shard dim become DTensors over tp (dense view) or ep (expert view); then FSDP2 cuts
everything over dp, or edp for experts. Gradients are pure sums (design law 2): no averaging anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from parallel.sharding.adopt import check_given
from parallel.sharding.param import (
    Given,
    ParamSpec,
    buffer_value,
    declared,
    global_index,
    initial_values,
    local,
    own_specs,
    set_spec,
)
from parallel.topology.layout import View
from parallel.topology.mesh import ModuleMesh


@dataclass(frozen=True)
class ShardPolicy:
    """How FSDP2 holds a module.

    layers: submodules that are gathered and freed on their own; empty means the module as one unit, which
        costs two collectives a step and keeps the gathered weights from forward to backward.
    compute_dtype: dtype that weights are gathered in (None: as stored); gradients are reduced in the stored
        dtype. precise: submodules whose weights are gathered as stored all the same.
    """

    layers: Sequence[nn.Module] = ()
    compute_dtype: torch.dtype | None = None
    precise: Sequence[nn.Module] = ()


def shard_module(
    module: nn.Module, mesh: ModuleMesh, policy: ShardPolicy, *, param_dtype: torch.dtype
) -> None:
    """Cut `module`, built on the meta device with its global shapes, over `mesh`, in place.

    Afterwards call materialise(). Every rank of the module must call this alike.
    """
    for sub in module.modules():
        for name, spec in own_specs(sub).items():
            _cut(sub, name, spec, mesh)
    mixed = MixedPrecisionPolicy(
        param_dtype=policy.compute_dtype, reduce_dtype=param_dtype, cast_forward_inputs=False
    )
    stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    reshard = bool(policy.layers)
    if policy.compute_dtype is not None:
        for sub in policy.precise:
            _fully_shard(sub, mesh, "dense", stored, reshard)
    if mesh.folded:
        for sub in module.modules():
            if any(spec.view == "expert" for spec in own_specs(sub).values()):
                _fully_shard(sub, mesh, "expert", mixed, reshard)
    for layer in policy.layers:
        _fully_shard(layer, mesh, "dense", mixed, reshard)
    _fully_shard(module, mesh, "dense", mixed, False)
    for sub in module.modules():
        if isinstance(sub, FSDPModule):
            # The order matters: gloo has no pre-multiplied sum, which a bare divide factor would choose.
            sub.set_force_sum_reduction_for_comms(True)
            sub.set_gradient_divide_factor(1.0)


def _cut(sub: nn.Module, name: str, spec: ParamSpec, mesh: ModuleMesh) -> None:
    """Replace a parameter of global shape (on meta) by a DTensor over tp, ep or etp, if it is cut."""
    cuts = model_cuts(spec, mesh)
    if not cuts:
        return
    old = getattr(sub, name)
    shape = list(old.shape)
    for axis, dim in cuts.items():
        size = mesh.over(spec.view, axis).size()
        if shape[dim] % size:
            raise ValueError(
                f"{type(sub).__name__}.{name} of shape {list(old.shape)}: dim {dim} does not divide by "
                f"{axis}={size}"
            )
        shape[dim] //= size
    shard = torch.empty(shape, dtype=old.dtype, device=old.device)
    over = mesh.over(spec.view, *cuts)
    tensor = DTensor.from_local(shard, over, [Shard(dim) for dim in cuts.values()], run_check=False)
    setattr(sub, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _fully_shard(
    sub: nn.Module, mesh: ModuleMesh, view: View, mp_policy: MixedPrecisionPolicy, reshard: bool
) -> None:
    over = mesh.data if view == "dense" else mesh.over("expert", "edp")
    dims = {
        id(param): data_dim(tuple(local(param).shape), model_cuts(spec, mesh).values(), over.size())
        for _, param, spec in declared(sub)
        if param.ndim
    }
    sub.register_forward_hook(_own)  # before FSDP's own, which hooks into the backward of the output
    fully_shard(
        sub,
        mesh=over,
        mp_policy=mp_policy,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda p: Shard(dims[id(p)]),
        # FSDP takes no scalars: these are whole on each rank, and the optimizer sums their gradients.
        ignored_params={p for p in sub.parameters() if not p.ndim},
    )


def _own(sub: nn.Module, args: Any, output: Any) -> Any:
    """The output without views: FSDP's hook on a view is lost, and gradients are wrong, once the view is
    written to; it warns of every one."""
    if not torch.is_grad_enabled():
        return output
    return tree_map_only(
        Tensor, lambda t: t.clone() if t.requires_grad and t._base is not None else t, output
    )


def model_cuts(spec: ParamSpec, mesh: ModuleMesh) -> dict[str, int]:
    """The axes that cut a parameter in this layout, each with the dim that it cuts; empty where it is whole
    on each rank."""
    wanted = {"tp": spec.shard_dim} if spec.view == "dense" else {"ep": spec.shard_dim, "etp": spec.etp_dim}
    axes = {"tp": mesh.axes.tp, "ep": mesh.axes.ep, "etp": mesh.axes.etp}
    return {axis: dim for axis, dim in wanted.items() if dim is not None and axes[axis].size > 1}


def data_mesh(spec: ParamSpec, mesh: ModuleMesh) -> DeviceMesh:
    """The mesh axis that FSDP cuts a parameter over: dp, or edp for experts where that differs."""
    return mesh.over("expert", "edp") if spec.view == "expert" and mesh.folded else mesh.data


def data_dim(shape: tuple[int, ...], cuts: Collection[int], size: int) -> int:
    """Which dim FSDP cuts over `size` ranks, for a parameter of `shape` after its dims `cuts` were cut.

    Dim 0 may be cut unevenly, others only evenly (FSDP2). A dim that is cut already is left alone where
    another one divides, since a dim cut twice is interleaved in the global tensor.
    """
    if 0 not in cuts or size == 1:
        return 0
    return next((d for d in range(1, len(shape)) if d not in cuts and shape[d] % size == 0), 0)


def held_indices(shape: tuple[int, ...], spec: ParamSpec, mesh: ModuleMesh) -> list[Tensor]:
    """Global indices per dim of the elements that this rank holds of a parameter of global `shape`."""
    held = [torch.arange(n) for n in shape]
    cuts = model_cuts(spec, mesh)
    for axis, dim in cuts.items():
        held[dim] = _chunk(held[dim], mesh.over(spec.view, axis))
    if not shape:
        return held
    over = data_mesh(spec, mesh)
    dim = data_dim(tuple(len(h) for h in held), cuts.values(), over.size())
    held[dim] = _chunk(held[dim], over)
    return held


def _chunk(index: Tensor, mesh: DeviceMesh) -> Tensor:
    chunks = torch.chunk(index, mesh.size())
    part = mesh.get_local_rank()
    return chunks[part] if part < len(chunks) else index[:0]


@torch.no_grad()
def materialise(
    module: nn.Module,
    mesh: ModuleMesh,
    *,
    seed: int,
    name: str,
    device: torch.device,
    again: Callable[[], nn.Module] | None = None,
) -> None:
    """Allocate this rank's shards and fill them with the initial weights of the module called `name`.

    No rank ever holds more than its own shard, but of values that a parameter was given, which are freed.
    Buffers have the values that the module was made with. again: makes the module on the CPU, which is called
    where a buffer was made on the meta device and so has no value. Every rank of the module must call this
    alike; raises ValueError for a buffer without a value, and for given values that differ between ranks.
    """
    given = {full: spec.init.values for full, _, spec in declared(module) if isinstance(spec.init, Given)}
    check_given(given, mesh.stage, device)
    del given
    buffers, ties = _buffers(module, again), _ties(module)
    module.to_empty(device=device)
    for tie in ties:  # to_empty makes a parameter for each name
        for sub, key in tie[1:]:
            setattr(sub, key, getattr(*tie[0]))
    for sub, key, value in buffers:
        setattr(sub, key, value.to(device))
    for full, param, spec in declared(module):
        shard = local(param)
        held = held_indices(tuple(param.shape), spec, mesh)
        index = global_index(tuple(param.shape), held).to(device)
        assert index.shape == shard.shape, (full, index.shape, shard.shape)
        shard.copy_(initial_values(f"{name}.{full}", seed, spec.init, index))
    for sub in module.modules():
        for key, spec in own_specs(sub).items():
            if isinstance(spec.init, Given):
                set_spec(sub, key, replace(spec, init=None))


def _ties(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places, module and name, of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for sub in module.modules():
        for key, param in sub.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(param), []).append((sub, key))
    return [found for found in places.values() if len(found) > 1]


def _buffers(module: nn.Module, again: Callable[[], nn.Module] | None) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, value on the CPU or where it is) of every buffer; one that has several names is one
    tensor afterwards too."""
    values: dict[int, Tensor] = {}
    made: dict[str, Tensor] = {}
    out = []
    for prefix, sub in module.named_modules():
        for key, buffer in sub.named_buffers(recurse=False, remove_duplicate=False):
            full, start = f"{prefix}.{key}" if prefix else key, buffer_value(sub, key)
            if id(buffer) not in values:
                if start is not None:
                    values[id(buffer)] = torch.full(tuple(buffer.shape), start, dtype=buffer.dtype)
                elif not buffer.is_meta:
                    values[id(buffer)] = buffer.detach().contiguous()
                else:
                    if not made and again is not None:
                        made = dict(again().named_buffers(remove_duplicate=False))
                    values[id(buffer)] = _made_again(full, buffer, made)
            out.append((sub, key, values[id(buffer)]))
    return out


def _made_again(full: str, buffer: Tensor, made: Mapping[str, Tensor]) -> Tensor:
    found = made.get(full)
    if found is None or found.is_meta or (found.shape, found.dtype) != (buffer.shape, buffer.dtype):
        raise ValueError(
            f"buffer {full} was made on the meta device, so that it has no value; needed: buffers made on "
            "the CPU, without device=, or parallel.sharding.param.declare_buffer()"
        )
    return found.contiguous()
