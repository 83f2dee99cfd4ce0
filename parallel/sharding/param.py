"""Parameters declared once, by their global shape: how they start, and how they are cut.

A layer declares every parameter with its global shape, an initial distribution and the dim that an axis
cuts. Nothing else in the project needs to know a parameter's name: sharding, initialisation, gradient
norms and checkpoints all work from these declarations.

Initial values are a function of (seed, full name, global element index) alone (design law 3), so a layout
never changes what a run starts from. A counter-based generator (splitmix64) makes any shard of a tensor
directly, on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.topology.layout import View


@dataclass(frozen=True)
class Init:
    """An initial distribution: two independent uniforms in (0, 1), float64, to values of the same shape."""

    draw: Callable[[Tensor, Tensor], Tensor]


def constant(value: float) -> Init:
    return Init(lambda u, v: torch.full_like(u, value))


def normal(std: float) -> Init:
    """Box-Muller in float64."""
    return Init(lambda u, v: std * torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v))


def uniform(low: float, high: float) -> Init:
    return Init(lambda u, v: low + (high - low) * u)


@dataclass(frozen=True)
class Given:
    """Initial values that are there already, of a parameter's global shape.

    keyed: they do not depend on what was made before them, as those from a generator's sequence do.
    """

    values: Tensor
    keyed: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """What must be known of a parameter beyond its global shape.

    init: how it starts; None once values that were Given are in place, for they are not kept twice.
    shard_dim: the dim cut evenly over the view's axis (tp for dense, ep for expert), None if replicated.
    etp_dim: a second dim of an expert parameter, cut evenly over etp; None where each expert is whole.
    partial: a replicated parameter whose gradient differs between tp ranks because they saw different
        tokens; the gradients are summed over tp once per step.
    precise: kept and gathered in the parameter dtype when the rest computes in bfloat16.
    trained: False for one that is never trained, whatever its module does.
    """

    init: Init | Given | None
    shard_dim: int | None = None
    view: View = "dense"
    partial: bool = False
    precise: bool = False
    etp_dim: int | None = None
    trained: bool = True


def declare(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    spec: ParamSpec | Init,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Register parameter `name` of global `shape` on `module`.

    spec: how it starts, in a ParamSpec where an axis shards it or more is to be said of it.
    """
    module.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
    set_spec(module, name, ParamSpec(spec) if isinstance(spec, Init) else spec)


def set_spec(module: nn.Module, name: str, spec: ParamSpec) -> None:
    """Declare what `spec` says of the parameter `name` that is registered on `module`."""
    module.__dict__.setdefault("_param_specs", {})[name] = spec


def declare_buffer(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    value: float,
    *,
    persistent: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Register buffer `name` that starts with `value` everywhere, on any device, the meta device too."""
    buffer = torch.full(shape, value, device=device, dtype=dtype)
    module.register_buffer(name, buffer, persistent=persistent)
    module.__dict__.setdefault("_buffer_values", {})[name] = value


def buffer_value(module: nn.Module, name: str) -> float | None:
    """What a buffer on `module` itself was declared to start with; None where it was not declared."""
    return module.__dict__.get("_buffer_values", {}).get(name)


def own_specs(module: nn.Module) -> dict[str, ParamSpec]:
    """The declarations of the parameters registered on `module` itself, by short name."""
    return module.__dict__.get("_param_specs", {})


def declared(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """(full name, parameter, spec) of every parameter below `module`, in registration order; one that has
    several names comes once. Raises ValueError for a parameter that was not declared."""
    seen: set[int] = set()
    for prefix, sub in module.named_modules():
        specs = own_specs(sub)
        for name, param in sub.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in specs:
                raise ValueError(
                    f"parameter {full} was not declared; needed: parallel.sharding.adopt(module) around the "
                    f"{type(sub).__name__} that has it, or around what that is part of, which keeps the "
                    "values that it has now, or parallel.sharding.declare() in place of nn.Parameter"
                )
            if id(param) not in seen:
                seen.add(id(param))
                yield full, param, specs[name]


def keep_whole(module: nn.Module) -> None:
    """Declare that no axis cuts the parameters below `module`: each tp or ep rank holds them whole."""
    for sub in module.modules():
        specs = own_specs(sub)
        specs.update({name: replace(spec, shard_dim=None, etp_dim=None) for name, spec in specs.items()})


def local(param: Tensor | nn.Module) -> Tensor:
    """This rank's shard of a parameter as a plain tensor, differentiable.

    The type admits modules only because that is how type checkers see an attribute of a module.
    """
    assert isinstance(param, Tensor)
    return param.to_local() if isinstance(param, DTensor) else param


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; splitmix64 wants logical ones.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(counter: Tensor, key: int) -> Tensor:
    z = counter * _GOLDEN + key
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _unit(bits: Tensor) -> Tensor:
    # 53 bits, centred in their cell: never 0 and never 1, so that log() is finite.
    return (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


@contextmanager
def seeded(name: str, seed: int) -> Iterator[None]:
    """Torch's generator on the CPU begins as a function of (seed, name), and goes on afterwards as if nothing
    had been drawn. For modules that draw their initial values themselves."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_key(seed, name) >> 1)
        yield


def initial_values(name: str, seed: int, init: Init | Given | None, index: Tensor) -> Tensor:
    """Initial values of the elements of parameter `name` with global linear `index` (int64): float64, or in
    the dtype in which they are given."""
    assert init is not None, f"{name}: its given values are in place and not kept"
    if isinstance(init, Given):
        return init.values.reshape(-1)[index.to(init.values.device)].to(index.device)
    key = _signed(_key(seed, name))
    u = _unit(_splitmix64(2 * index, key))
    v = _unit(_splitmix64(2 * index + 1, key))
    return init.draw(u, v)


def global_index(shape: tuple[int, ...], held: list[Tensor]) -> Tensor:
    """Linear indices in a tensor of global `shape` of the block held[0] x held[1] x .. (indices per dim)."""
    index = torch.zeros((), dtype=torch.int64, device=held[0].device if held else None)
    for size, dim_index in zip(shape, held, strict=True):
        index = index.unsqueeze(-1) * size + dim_index
    return index


@torch.no_grad()
def initialise(module: nn.Module, seed: int, name: str) -> None:
    """Fill the whole, unsharded parameters of `module`, called `name` in the model graph."""
    for full, param, spec in declared(module):
        held = [torch.arange(n, device=param.device) for n in param.shape]
        values = initial_values(f"{name}.{full}", seed, spec.init, global_index(tuple(param.shape), held))
        param.copy_(values.reshape(param.shape))
