"""Where the host waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mm.virtual.records import HostWait
from mm.virtual.source import Site
from mm.virtual.values import device_type

_aten = torch.ops.aten


class HostWaits:
    """Counts the waits of a rank. A wait for one `tolist` is one, however many values it reads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase = "step"
        self._count: Counter[tuple[str, int, str, str]] = Counter()

    def add(self, why: str, site: Site) -> None:
        """Count one."""
        self._count[site.file, site.line, why, self.phase] += 1

    def all(self) -> tuple[HostWait, ...]:
        """All places, in the order of their first waits."""
        return tuple(
            HostWait(file, line, count, why, phase) for (file, line, why, phase), count in self._count.items()
        )

    def why(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> str:
        """Why the host waits in an operation, "" where it does not."""
        if not any(device_type(t) == self.device.type for t in given):
            to = kwargs.get("device")
            if (
                func is _aten._to_copy.default
                and to is not None
                and torch.device(to).type == self.device.type
            ):
                return self._of_copy(given[0], kwargs.get("non_blocking", False))
            return ""
        if func is _aten._local_scalar_dense.default or func is _aten.equal.default:
            return "read"
        if _shaped_by_values(func, args, kwargs):
            return "shape"
        if func is _aten._to_copy.default:
            to = kwargs.get("device")
            if to is not None and torch.device(to).type != self.device.type:
                return "" if kwargs.get("non_blocking", False) else "copy"
        if func is _aten.copy_.default and device_type(given[0]) != device_type(given[1]):
            late = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
            if device_type(given[0]) == self.device.type:
                return self._of_copy(given[1], late)
            return "" if late else "copy"
        return ""

    def _of_copy(self, host: Tensor, non_blocking: bool) -> str:
        """Of a copy from the host: one from pageable memory may wait even where it is asked not to."""
        return "" if non_blocking and is_pinned(host) else "copy"


def pin(x: Tensor) -> None:
    """Let a tensor of the host count as pinned."""
    x.untyped_storage()._pinned = True  # type: ignore[attr-defined]  # an attribute of this one storage


def is_pinned(x: Tensor) -> bool:
    """Whether a tensor of the host counts as pinned."""
    return bool(getattr(x.untyped_storage(), "_pinned", False))


def _shaped_by_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is _aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
