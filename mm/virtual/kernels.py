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
from mm.virtual.values import device_type

_Shapes = tuple[tuple[int, ...], ...]
_Key = tuple[str, Any, _Shapes, _Shapes, torch.dtype]  # (module, operation, shapes given and made, dtype)


class Kernels:
    """Counts kernels of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._count: Counter[_Key] = Counter()
        self._cost: dict[_Key, tuple[int, int]] = {}

    def add(self, module: str, func: Any, given: list[Tensor], made: list[Tensor], call: Any) -> None:
        """Count a call. given, made: its tensors; call: its (args, kwargs, result)."""
        if not made or all(device_type(t) != self.device.type for t in made):
            return
        results = tuple(tuple(t.shape) for t in made)
        key = module, func, tuple(tuple(t.shape) for t in given), results, made[0].dtype
        self._count[key] += 1
        if key not in self._cost:
            size = sum(t.numel() * t.element_size() for t in (*given, *made))
            self._cost[key] = flops_of(func, call, given), size

    def all(self) -> tuple[Kernel, ...]:
        """All classes, in the order of their first calls."""
        return tuple(
            Kernel(
                module=module,
                op=str(func),
                shapes=shapes,
                dtype=str(dtype).removeprefix("torch."),
                count=n,
                flops=self._cost[module, func, shapes, results, dtype][0],
                bytes=self._cost[module, func, shapes, results, dtype][1],
            )
            for (module, func, shapes, results, dtype), n in self._count.items()
        )


def flops_of(func: Any, call: Any, given: list[Tensor]) -> int:
    """FLOPs of a call, a multiply and an add as two; 0 for what is no product."""
    args, kwargs, out = call
    packet = func._overloadpacket
    if packet in _ATTENTION:
        if packet.__name__.endswith("backward"):  # of which the gradient comes first
            return attention_flops(*given[1:4], backward=True)
        return attention_flops(*given[:3])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is torch.ops.aten._grouped_mm:
        return grouped_flops(given[0], given[1], out)
    return 0


_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False) -> int:
    """FLOPs of fused attention; q [B, H, L, D], k and v [B, H_kv, S, D]. As torch counts them: a causal mask
    saves nothing, and a backward computes the scores again, five products for two."""
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    widths = 3 * q.shape[-1] + 2 * v.shape[-1] if backward else q.shape[-1] + v.shape[-1]
    return 2 * pairs * widths


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
