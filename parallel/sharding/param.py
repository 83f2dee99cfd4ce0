"""Parameters declared once, by their global shape: how they start, and how they are sharded.

A layer declares every parameter with its global shape, an initial distribution and the dim that an axis
shards. Sharding, initialisation, gradient norms and checkpoints all work from these declarations, so nothing
else in the project needs to know a parameter's name.

Initial values are a function of (seed, full name, global element index) alone (law 3), so a layout never
changes what a run starts from. A counter-based generator (splitmix64; Steele et al., OOPSLA 2014) makes any
shard of a tensor directly, on any device.
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
    """An initial distribution.

    draw: maps two independent uniforms in (0, 1), float64 tensors of one shape, to values of that shape.
    """

    draw: Callable[[Tensor, Tensor], Tensor]


def constant(value: float) -> Init:
    """Every element is `value`."""
    return Init(lambda u, v: torch.full_like(u, value))


def normal(std: float) -> Init:
    """Normal with mean 0 and deviation `std`, by Box-Muller in float64."""
    return Init(lambda u, v: std * torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v))


def uniform(low: float, high: float) -> Init:
    """Uniform in (low, high)."""
    return Init(lambda u, v: low + (high - low) * u)


@dataclass(frozen=True)
class Given:
    """Initial values that exist already.

    values: a tensor of the parameter's global shape.
    keyed: True where the values depend on a key alone. Values drawn from a running generator are not keyed:
        they depend on what was drawn before them.
    """

    values: Tensor
    keyed: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """What sharding, initialisation and the optimizer know of a parameter beyond its global shape.

    init: how it starts. None once Given values are in the parameter itself, which frees the copy here.
    shard_dim: the dim sharded evenly over the view's axis (tp for dense, ep for expert). None: replicated.
    view: "dense" (sharded over tp and the data ranks) or "expert" (over ep, etp and edp).
    partial: True for a replicated parameter whose gradient differs between tp ranks, because they saw
        different tokens or heads. These gradients are summed over tp once a step.
    precise: True for a parameter that is gathered in its stored dtype where the rest computes in bfloat16.
    etp_dim: a second dim of an expert parameter, sharded evenly over etp. None: each expert is whole.
    trained: False for a parameter that is never trained, whatever its module does.
    matrix: False for two dims that are no linear map of features: an embedding, a head, taps of a
        convolution. Muon leaves these to AdamW.
    """

    init: Init | Given | None
    shard_dim: int | None = None
    view: View = "dense"
    partial: bool = False
    precise: bool = False
    etp_dim: int | None = None
    trained: bool = True
    matrix: bool = True


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

    spec: a bare Init declares a replicated dense parameter; anything else needs a ParamSpec.
    device, dtype: of the parameter, as torch.empty() takes them.
    """
    module.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
    set_spec(module, name, ParamSpec(spec) if isinstance(spec, Init) else spec)


def set_spec(module: nn.Module, name: str, spec: ParamSpec) -> None:
    """Attach `spec` to the parameter `name` that is registered on `module`."""
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
    """Register buffer `name` of `shape`, filled with `value`.

    The value is recorded, so materialise() can restore a buffer that was made on the meta device.
    """
    buffer = torch.full(shape, value, device=device, dtype=dtype)
    module.register_buffer(name, buffer, persistent=persistent)
    module.__dict__.setdefault("_buffer_values", {})[name] = value


def buffer_value(module: nn.Module, name: str) -> float | None:
    """The value that buffer `name` of `module` itself was declared with; None where it was not declared."""
    values: dict[str, float] = module.__dict__.get("_buffer_values", {})
    return values.get(name)


def own_specs(module: nn.Module) -> dict[str, ParamSpec]:
    """The declarations of the parameters registered on `module` itself, by short name."""
    specs: dict[str, ParamSpec] = module.__dict__.get("_param_specs", {})
    return specs


def declared(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """(full name, parameter, spec) of every parameter below `module`, in registration order.

    A parameter with several names comes once, under its first. Raises ValueError for a parameter that was
    not declared.
    """
    seen: set[int] = set()
    for prefix, sub in module.named_modules():
        specs = own_specs(sub)
        for name, param in sub.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name not in specs:
                raise ValueError(
                    f"parameter {full} was not declared; needed: parallel.sharding.adopt(module) around the "
                    f"{type(sub).__name__} that has it, or around a module that contains it, which keeps the "
                    "present values; or parallel.sharding.declare() in place of nn.Parameter"
                )
            if id(param) not in seen:
                seen.add(id(param))
                yield full, param, specs[name]


def keep_whole(module: nn.Module) -> None:
    """Declare that no axis shards the parameters below `module`: each tp or ep rank holds them whole."""
    for sub in module.modules():
        specs = own_specs(sub)
        specs.update({name: replace(spec, shard_dim=None, etp_dim=None) for name, spec in specs.items()})


def local(param: Tensor | nn.Module) -> Tensor:
    """This rank's shard of a parameter as a plain tensor, differentiable.

    The annotation admits modules because type checkers see a module's attribute as Tensor | Module.
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
    # int64 shifts are arithmetic; splitmix64 needs logical ones.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(counter: Tensor, key: int) -> Tensor:
    z = counter * _GOLDEN + key
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _unit(bits: Tensor) -> Tensor:
    # The top 53 bits, centred in their cell: never 0 and never 1, so log() is finite.
    return (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


@contextmanager
def seeded(name: str, seed: int) -> Iterator[None]:
    """Seed torch's CPU generator from (seed, name), for modules that draw their own initial values.

    On exit the generator returns to its state from before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_key(seed, name) >> 1)
        yield


def initial_values(name: str, seed: int, init: Init | Given | None, index: Tensor) -> Tensor:
    """Initial values of the elements of parameter `name` at the global linear indices `index` (int64).

    The result is float64, or has the dtype of Given values; its shape is that of `index`.
    """
    assert init is not None, f"{name}: its given values are in the parameter and no longer kept"
    if isinstance(init, Given):
        return init.values.reshape(-1)[index.to(init.values.device)].to(index.device)
    key = _signed(_key(seed, name))
    u = _unit(_splitmix64(2 * index, key))
    v = _unit(_splitmix64(2 * index + 1, key))
    return init.draw(u, v)


def global_index(shape: tuple[int, ...], held: list[Tensor]) -> Tensor:
    """Linear indices, in a tensor of global `shape`, of a block of its elements.

    held[d]: the block's indices in dim d. Returns int64 [len(held[0]), len(held[1]), ..].
    """
    index = torch.zeros((), dtype=torch.int64, device=held[0].device if held else None)
    for size, dim_index in zip(shape, held, strict=True):
        index = index.unsqueeze(-1) * size + dim_index
    return index


@torch.no_grad()
def initialise(module: nn.Module, seed: int, name: str) -> None:
    """Fill the parameters of an unsharded `module`, called `name` in the model graph; see materialise()."""
    for full, param, spec in declared(module):
        held = [torch.arange(n, device=param.device) for n in param.shape]
        values = initial_values(f"{name}.{full}", seed, spec.init, global_index(tuple(param.shape), held))
        param.copy_(values.reshape(param.shape))
