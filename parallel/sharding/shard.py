"""Sharding a module over its mesh, and making its initial weights shard by shard.

Weights declared with a shard dim become DTensors over tp (dense view) or ep and etp (expert view). Then FSDP2
shards every parameter over the data ranks (dp with cp), or over edp for experts. Gradients are summed and
never averaged (law 2).
"""

from __future__ import annotations

import itertools
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
    """How FSDP2 shards a module.

    layers: submodules that are gathered and freed on their own. Empty: the module is one unit, which costs
        two collectives a step and keeps the gathered weights from forward to backward.
    compute_dtype: dtype that weights are gathered in; None: the stored dtype. Gradients are reduced in the
        stored dtype either way.
    precise: submodules whose weights are gathered in the stored dtype whatever compute_dtype is.
    keep: gathered weights stay until the caller frees them (whole.py), whatever runs in between.
    """

    layers: Sequence[nn.Module] = ()
    compute_dtype: torch.dtype | None = None
    precise: Sequence[nn.Module] = ()
    keep: bool = False


def shard_module(
    module: nn.Module, mesh: ModuleMesh, policy: ShardPolicy, *, param_dtype: torch.dtype
) -> None:
    """Shard `module`, built on the meta device with its global shapes, over `mesh`, in place.

    Collective over the module's ranks: each must call it with the same arguments. Call materialise() next.
    param_dtype: dtype that parameters are stored in and gradients are reduced in. Raises ValueError for a dim
    that its axes do not divide.
    """
    place_module(module, mesh)
    mixed = MixedPrecisionPolicy(
        param_dtype=policy.compute_dtype, reduce_dtype=param_dtype, cast_forward_inputs=False
    )
    stored = MixedPrecisionPolicy(cast_forward_inputs=False)
    reshard = bool(policy.layers) and not policy.keep
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
            # The order matters: a divide factor alone would choose a pre-multiplied sum, which gloo lacks.
            sub.set_force_sum_reduction_for_comms(True)
            sub.set_gradient_divide_factor(1.0)
            sub.set_reshard_after_backward(not policy.keep, recurse=False)
    if mesh.data.device_type == "cpu":
        _prefetch([module, *policy.layers])


def place_module(module: nn.Module, mesh: ModuleMesh) -> None:
    """Leave of `module`, built on the meta device with its global shapes, what the model-parallel axes give
    this rank, in place. Every data rank holds the same: for inference. Call materialise() next.

    Raises ValueError for a dim that its axes do not divide.
    """
    for sub in module.modules():
        for name, spec in own_specs(sub).items():
            _to_dtensor(sub, name, spec, mesh)


def _prefetch(units: Sequence[nn.Module]) -> None:
    """Have each unit start the gather of the next one before it computes; FSDP does so in backwards.

    On accelerators FSDP does both of itself, on streams. A host waits in gathers that are not asynchronous.
    """
    for unit, following in itertools.pairwise(units):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
    whole = units[0]
    assert isinstance(whole, FSDPModule)
    whole._set_unshard_async_op(True)


def _to_dtensor(sub: nn.Module, name: str, spec: ParamSpec, mesh: ModuleMesh) -> None:
    """Replace a parameter of global shape (on meta) by a DTensor over tp, ep or etp, where these shard it."""
    sharded = sharded_dims(spec, mesh)
    if not sharded:
        return
    old = getattr(sub, name)
    shape = list(old.shape)
    for axis, dim in sharded.items():
        size = mesh.over(spec.view, axis).size()
        if shape[dim] % size:
            raise ValueError(
                f"{type(sub).__name__}.{name} of shape {list(old.shape)}: dim {dim} does not divide by "
                f"{axis}={size}"
            )
        shape[dim] //= size
    shard = torch.empty(shape, dtype=old.dtype, device=old.device)
    over = mesh.over(spec.view, *sharded)
    tensor = DTensor.from_local(shard, over, [Shard(dim) for dim in sharded.values()], run_check=False)
    setattr(sub, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _fully_shard(
    sub: nn.Module, mesh: ModuleMesh, view: View, mp_policy: MixedPrecisionPolicy, reshard: bool
) -> None:
    over = mesh.data_parallel(view)
    shards = over.size(over.ndim - 1)
    dims = {
        id(param): data_dim(tuple(local(param).shape), sharded_dims(spec, mesh).values(), shards)
        for _, param, spec in declared(sub)
        if param.ndim
    }
    # Registered before FSDP's own hook, which attaches FSDP's backward to the output.
    sub.register_forward_hook(_without_views)
    fully_shard(
        sub,
        mesh=over,
        mp_policy=mp_policy,
        reshard_after_forward=reshard,
        shard_placement_fn=lambda p: Shard(dims[id(p)]),
        # FSDP refuses scalars. They stay whole on each rank, and the optimizer sums their gradients.
        ignored_params={p for p in sub.parameters() if not p.ndim},
    )


def _without_views(sub: nn.Module, args: Any, output: Any) -> Any:
    """The output with every view cloned.

    An in-place write to a view drops the hook that FSDP put on it, and gradients are then wrong. FSDP warns
    of every view.
    """
    if not torch.is_grad_enabled():
        return output
    return tree_map_only(
        Tensor, lambda t: t.clone() if t.requires_grad and t._base is not None else t, output
    )


def sharded_dims(spec: ParamSpec, mesh: ModuleMesh) -> dict[str, int]:
    """By axis (tp, ep, etp), the dim of a parameter that it shards in this layout.

    Axes of one rank are left out. Empty where every model-parallel rank holds the parameter whole.
    """
    wanted = {"tp": spec.shard_dim} if spec.view == "dense" else {"ep": spec.shard_dim, "etp": spec.etp_dim}
    axes = {"tp": mesh.axes.tp, "ep": mesh.axes.ep, "etp": mesh.axes.etp}
    return {axis: dim for axis, dim in wanted.items() if dim is not None and axes[axis].size > 1}


def data_view(spec: ParamSpec, mesh: ModuleMesh) -> View:
    """The view whose data ranks share a parameter: the expert view for experts, where that differs."""
    return "expert" if spec.view == "expert" and mesh.folded else "dense"


def data_mesh(spec: ParamSpec, mesh: ModuleMesh) -> DeviceMesh:
    """The mesh that FSDP shards a parameter over."""
    return mesh.over("expert", "edp") if data_view(spec, mesh) == "expert" else mesh.data


def data_dim(shape: tuple[int, ...], sharded: Collection[int], size: int) -> int:
    """The dim that FSDP shards over `size` ranks.

    shape: of the parameter, after model-parallel axes have sharded its dims `sharded`. FSDP2 may shard dim 0
    unevenly, and other dims only evenly. An unsharded dim that divides is preferred, because a dim that is
    sharded twice is interleaved in the global tensor.
    """
    if 0 not in sharded or size == 1:
        return 0
    return next((d for d in range(1, len(shape)) if d not in sharded and shape[d] % size == 0), 0)


def held_indices(shape: tuple[int, ...], spec: ParamSpec, mesh: ModuleMesh) -> list[Tensor]:
    """Global indices, int64 for each dim, of the elements that this rank holds of a parameter.

    shape: the parameter's global shape.
    """
    held = [torch.arange(n) for n in shape]
    sharded = sharded_dims(spec, mesh)
    for axis, dim in sharded.items():
        held[dim] = _chunk(held[dim], mesh.over(spec.view, axis))
    if not shape:
        return held
    over = data_mesh(spec, mesh)
    dim = data_dim(tuple(len(h) for h in held), sharded.values(), over.size())
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
    seed: int | None,
    name: str,
    device: torch.device,
    again: Callable[[], nn.Module] | None = None,
) -> None:
    """Allocate this rank's shards of a sharded module and fill them with its initial weights.

    Collective over the module's ranks: each must call it with the same arguments. A rank never holds more
    than its own shards, except for Given values, which this call frees. Buffers keep the values that the
    module was made with.

    seed, name: initial weights are a function of both; `name` is the module's name in the model graph. Where
        seed is None, weights are allocated and not filled.
    again: makes the module on the CPU. It is called only where a buffer was made on the meta device, and so
        has no value.
    Raises ValueError for a buffer without a value, and for given values that differ between ranks.
    """
    given = {full: spec.init.values for full, _, spec in declared(module) if isinstance(spec.init, Given)}
    check_given(given, mesh.stage, device)
    del given
    buffers, ties = _buffers(module, again), _ties(module)
    module.to_empty(device=device)
    for tie in ties:  # to_empty() makes a separate parameter for each name
        for sub, key in tie[1:]:
            setattr(sub, key, getattr(*tie[0]))
    for sub, key, value in buffers:
        setattr(sub, key, value.to(device))
    for full, param, spec in declared(module):
        if seed is None:
            break
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
    """For each tied parameter, the modules that register it, each with the name that it has there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for sub in module.modules():
        for key, param in sub.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((sub, key))
    return [found for found in owners.values() if len(found) > 1]


def _buffers(module: nn.Module, again: Callable[[], nn.Module] | None) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, value) of every buffer, on the CPU or on the device it was made on.

    A buffer with several names is one tensor here too. again: see materialise().
    """
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
            f"buffer {full} was made on the meta device, so it has no value; needed: buffers made on the "
            "CPU, without device=, or parallel.sharding.param.declare_buffer()"
        )
    return found.contiguous()
