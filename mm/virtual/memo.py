"""Results of operations on fake tensors, remembered by what they are given.

A step runs the same few thousand operations on the same shapes again and again: for each layer, micro-batch
and recomputation. What FakeTensorMode found at the first is made again here, at a fraction of the time that
its own cache takes. Only operations are remembered whose result follows from shapes: those that make new
tensors, those that make views, and those that write to their first tensor and return it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_aten = torch.ops.aten
_NEVER = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_RESIZES = {_aten.set_, _aten.resize_, _aten.resize_as_}


class _Made(NamedTuple):
    """A tensor of a result. base: index of the tensor given whose storage it shares, None for a new one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    base: int | None


class _Result(NamedTuple):
    """made: the tensors of the result; None where it is the first tensor given. many: whether a list."""

    made: tuple[_Made, ...] | None
    many: type | None


class Memo:
    """Runs operations on fake tensors and remembers what they gave."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._known: dict[Any, _Result | None] = {}
        self._suited: dict[Any, bool] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """func(*args, **kwargs). given: its tensors, all fake, in order."""
        suited = self._suited.get(func)
        if suited is None:
            suited = self._suited[func] = _suited(func)
        key = _key(func, args, kwargs) if suited and given else None
        if key is None:
            return func(*args, **kwargs)
        if key not in self._known:
            out = func(*args, **kwargs)
            self._known[key] = None if key != _key(func, args, kwargs) else _result(func, given, out)
            return out
        known = self._known[key]
        if known is None:
            return func(*args, **kwargs)
        if known.made is None:
            return given[0]
        with unset_fake_temporarily():
            out = [self._make(m, given) for m in known.made]
        return out[0] if known.many is None else known.many(out)

    def _make(self, made: _Made, given: list[Tensor]) -> Tensor:
        out = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        if made.base is not None:
            storage = given[made.base].untyped_storage()
            out.set_(storage, made.offset, made.shape, made.stride)
        return FakeTensor(self.fake, out, made.device)


def _suited(func: Any) -> bool:
    """Whether an operation's result can follow from shapes alone."""
    if func.namespace != "aten" or func.overloadpacket in _RESIZES or set(_NEVER) & set(func.tags):
        return False
    if not func._schema.is_mutable:
        return True
    first, *others = func._schema.arguments
    returned = [r.alias_info for r in func._schema.returns]
    writes = [a for a in others if a.alias_info is not None and a.alias_info.is_write]
    return not writes and len(returned) == 1 and first.name == "self" and returned[0] is not None


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All that a result follows from; None where that is not known."""
    out: list[Any] = [func]
    if not _add(args, out):
        return None
    for name, x in kwargs.items():
        out.append(name)
        if not _add((x,), out):
            return None
    return tuple(out)


def _add(values: Any, out: list[Any]) -> bool:
    for x in values:
        kind = type(x)
        if isinstance(x, FakeTensor):
            out.append((x.shape, x.stride(), x.storage_offset(), x.dtype, x.fake_device))
        elif kind in _PLAIN:
            out.append((kind, x))
        elif kind is list or kind is tuple or kind is torch.Size:
            out.append((kind, len(x)))
            if not _add(x, out):
                return False
        else:
            return False
    return True


_PLAIN = {
    int,
    float,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
}


def _result(func: Any, given: list[Tensor], out: Any) -> _Result | None:
    """What to remember of a result; None where it is of another kind."""
    if out is given[0]:
        return _Result(None, None)
    if func._schema.is_mutable:
        return None
    many = None if isinstance(out, Tensor) else type(out)
    found = [out] if isinstance(out, Tensor) else out
    if many not in (None, list, tuple):
        return None
    tensors = [x for x in found if type(x) is FakeTensor]
    if len(tensors) < len(found):
        return None
    bases = {x.untyped_storage()._cdata: k for k, x in reversed(list(enumerate(given)))}
    made = []
    for x in tensors:
        base = bases.get(x.untyped_storage()._cdata)
        if base is None and (x.storage_offset() or _bytes(x) != x.untyped_storage().nbytes()):
            return None
        at = int(x.storage_offset())
        made.append(_Made(tuple(x.shape), x.stride(), at, x.dtype, x.fake_device, base))
    alone = {x.untyped_storage()._cdata for x in tensors}
    if len(alone) < len(tensors) and any(m.base is None for m in made):
        return None
    return _Result(tuple(made), many)


def _bytes(x: Tensor) -> int:
    """Of a storage that holds x and nothing else."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0
