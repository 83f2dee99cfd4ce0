"""Kernels by class: the operation and the shapes of what it is given, with FLOPs and bytes.

torch.utils.flop_counter has the formulas of products, convolutions and attention. The scan of the language
model consists of products. Grouped products have theirs here.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mm.virtual.records import Kernel

_Key = tuple[str, str, tuple[tuple[int, ...], ...], str, tuple[tuple[int, ...], ...]]


class Kernels:
    """Counts kernels of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._count: Counter[_Key] = Counter()
        self._cost: dict[_Key, tuple[int, int]] = {}

    def add(self, module: str, func: Any, given: list[Tensor], made: list[Tensor], call: Any) -> None:
        """Count a call. given, made: its tensors; call: its (args, kwargs, result)."""
        if not made or all(t.device.type != self.device.type for t in made):
            return
        shapes = tuple(tuple(t.shape) for t in given)
        results = tuple(tuple(t.shape) for t in made)
        key = module, str(func), shapes, str(made[0].dtype).removeprefix("torch."), results
        self._count[key] += 1
        if key not in self._cost:
            size = sum(t.numel() * t.element_size() for t in (*given, *made))
            self._cost[key] = flops_of(func, call, given), size

    def all(self) -> tuple[Kernel, ...]:
        """All classes, in the order of their first calls."""
        return tuple(
            Kernel(module=m, op=op, shapes=shapes, dtype=dtype, count=n, flops=cost[0], bytes=cost[1])
            for ((m, op, shapes, dtype, _), n), cost in (
                ((k, n), self._cost[k]) for k, n in self._count.items()
            )
        )


def flops_of(func: Any, call: Any, given: list[Tensor]) -> int:
    """FLOPs of a call, a multiply and an add as two; 0 for what is no product."""
    args, kwargs, out = call
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is torch.ops.aten._grouped_mm:
        return grouped_flops(given[0], given[1], out)
    return 0


def grouped_flops(a: Tensor, b: Tensor, out: Tensor) -> int:
    """FLOPs of a grouped product, whose groups share one of the dims.

    Rows [m, k] times [E, k, n]: each row is in one group. [k, m] times [m, n] to [E, k, n]: so is each
    element of the inner dim.
    """
    inner = a.shape[-1]
    if out.ndim == 3:  # one product a group, which share the inner dim
        return 2 * inner * math.prod(out.shape[1:])
    return 2 * inner * math.prod(out.shape)


_NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh")


def is_kernel(func: Any) -> bool:
    """Whether an operation computes: not where it makes a view, or memory without values."""
    schema = func._schema
    if schema.name.split("::")[-1] in _NO_KERNEL:
        return False
    views = [r.alias_info for r in schema.returns if r.alias_info is not None]
    return not views or any(info.is_write for info in views)
