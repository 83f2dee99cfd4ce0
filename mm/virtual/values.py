"""Values that stand in for what fake tensors do not have.

A step decides little by values: which experts a token chooses, and what follows from that, are small tensors
of integers. They get real values beside their fake tensors. What comes from the host (indices, sizes, masks)
has its own values, and an operation on tensors that all have values is computed. The choices themselves are
drawn: evenly, or with a given skew. So whatever the code reads later (row counts, splits) is consistent,
whichever way it works it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from mm.virtual.memo import Memo

MOST = {True: 1 << 22, False: 1 << 18}  # elements of a tensor that keeps values: of integers, of others
_aten = torch.ops.aten
_CHOOSES = (_aten.topk.default,)
_SORTS = (_aten.sort.default, _aten.sort.stable, _aten.argsort.stable, _aten.argsort.default)
_DRAWS = {*_CHOOSES, *_SORTS, _aten.slice.Tensor}


def drawn_choices(tokens: int, choices: int, experts: int, skew: float) -> np.ndarray:
    """Experts [tokens, choices], int64: the k-th expert gets a share that falls with a power of k.

    skew: rows of the fullest expert over the mean; 1 is even, experts / choices is the most there can be, as
    no token chooses an expert twice. Where `skew` does not divide evenly, the shares are rounded.
    """
    total = tokens * choices
    if skew <= 1.0:
        return (np.arange(total, dtype=np.int64) % experts).reshape(tokens, choices)
    quota = np.minimum(np.round(_shares(experts, min(skew, experts / choices)) * total), tokens)
    quota = quota.astype(np.int64)
    for e in range(experts):  # what rounding and the bound leave over goes to the fullest that have room
        quota[e] += max(0, min(tokens - quota[e], total - int(quota.sum())))
    # Column by column: an expert has at most `tokens` rows in a row, so no token gets it twice.
    expert = np.repeat(np.arange(experts, dtype=np.int64), quota)[:total]
    return np.ascontiguousarray(expert.reshape(choices, tokens).T)


def _shares(n: int, skew: float) -> np.ndarray:
    """Shares of n experts, falling by a power law whose largest is `skew` times the mean."""
    low, high = 0.0, 64.0
    rank = np.arange(1, n + 1, dtype=np.float64)
    for _ in range(60):
        middle = (low + high) / 2
        share = rank**-middle
        share /= share.sum()
        low, high = (middle, high) if share[0] * n < skew else (low, middle)
    return share


def device_type(x: Tensor) -> str:
    """x.device.type; asking a fake tensor for its device is an operation of its own, which takes its time."""
    return (x.fake_device if isinstance(x, FakeTensor) else x.device).type


def value_of(x: object) -> Tensor | None:
    """The real values of a tensor; None where it has none."""
    if not isinstance(x, FakeTensor):
        return None
    value: Tensor | None = getattr(x, "_stand_in", None)
    if value is None or getattr(value.untyped_storage(), "_stale", False):
        return None
    return value


def give(x: Tensor, value: Tensor) -> None:
    """Let a fake tensor have values."""
    assert not isinstance(value, FakeTensor)
    x._stand_in = value  # type: ignore[attr-defined]  # an attribute of this one tensor


class Values:
    """Runs operations on fake tensors, and on the values of those that have some.

    skew: of drawn_choices().
    """

    def __init__(self, fake: FakeTensorMode, skew: float) -> None:
        self.fake, self.skew = fake, skew
        self._memo = Memo(fake)
        self._seeded: dict[Any, bool] = {}

    def imported(self, x: Tensor) -> Tensor:
        """A tensor of the host as a fake one that has its values."""
        if isinstance(x, FakeTensor) or x.is_meta:
            return x
        with self.fake:
            out = self.fake.from_tensor(x)
        if x.numel() <= MOST[_whole(x)] and not isinstance(x, torch.nn.Parameter):
            give(out, x)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """func(*args, **kwargs), whose result has values where all that it depends on has."""
        tensors: list[Tensor] = []
        args = _map(args, self.imported, tensors)
        kwargs = {k: _map(v, self.imported, tensors) for k, v in kwargs.items()}
        known = self._known(func, tensors)
        if known and func in _DYNAMIC:
            return self._wrapped(self._compute(func, args, kwargs), tensors[0])
        if func is _aten._grouped_mm.default:
            out = _grouped(*args, **kwargs)
        else:
            out = self._memo.run(func, args, kwargs, tensors)
        if known:
            self._follow(func, args, kwargs, out)
        elif tensors:
            if func in _DRAWS:
                with unset_fake_temporarily():
                    self._draw(func, args, out)
            if func._schema.is_mutable:
                _forget(func, args, kwargs)
        return out

    def _known(self, func: Any, tensors: list[Tensor]) -> bool:
        if func in _CONSTANT:
            return True
        if func not in self._seeded:
            self._seeded[func] = torch.Tag.nondeterministic_seeded in func.tags
        if self._seeded[func]:
            return False
        return bool(tensors) and all(value_of(t) is not None for t in tensors)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Compute the values of a result."""
        first = out if isinstance(out, Tensor) else next((x for x in _flat(out)), None)
        if first is None:
            return
        results = [first] if isinstance(out, Tensor) else _flat(out)
        if not all(isinstance(x, FakeTensor) and x.numel() <= MOST[_whole(x)] for x in results):
            if func._schema.is_mutable:
                _forget(func, args, kwargs)
            return
        if func in _CONSTANT and not _whole(first) and not _is_small(first):
            return
        values = self._compute(func, args, kwargs)
        for x, value in zip(results, [values] if isinstance(values, Tensor) else _flat(values), strict=True):
            if value_of(x) is not value:
                give(x, value)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def real(x: Tensor) -> Tensor:
            value = value_of(x)
            return x if value is None else value

        with unset_fake_temporarily(), torch.no_grad():
            kept = {k: _map(v, real, []) for k, v in kwargs.items()}
            if kept.get("device") is not None:
                kept["device"] = torch.device("cpu")
            kept.pop("pin_memory", None)
            if func in _LIKE:  # their values do not depend on those of what they are like
                args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
            return func(*_map(args, real, []), **kept)

    def _wrapped(self, values: Any, like: Tensor) -> Any:
        """Results whose shapes depend on values, as fake tensors on the device of `like`."""

        def wrap(x: Tensor) -> Tensor:
            with self.fake:
                out = torch.empty(x.shape, dtype=x.dtype, device=like.device)
            give(out, x)
            return out

        return _map(values, wrap, [])

    def _draw(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Choices by scores that have no values."""
        if func in _CHOOSES and out[1].ndim == 2:
            n, k = out[1].shape
            drawn = drawn_choices(n, k, args[0].shape[-1], self.skew)
            give(out[1], torch.from_numpy(drawn))
        elif func in _SORTS:
            index: Tensor = out if isinstance(out, Tensor) else out[1]
            if index.ndim == 1 and index.numel() <= MOST[True]:
                give(index, torch.arange(len(index)))
            elif index.ndim == 2:
                # The best of all: which ones they are is drawn where some are taken.
                index._ranks_all = True  # type: ignore[attr-defined]
        elif func is _aten.slice.Tensor and hasattr(args[0], "_ranks_all") and out.ndim == 2:
            n, k = out.shape
            give(out, torch.from_numpy(drawn_choices(n, k, args[0].shape[1], self.skew)))


def _grouped(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: object = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of a grouped product; torch's own fake kernel takes bfloat16 alone."""
    shape = [*a.shape[:-1], b.shape[-1]]
    if a.ndim == b.ndim == 2:
        assert offs is not None
        shape = [len(offs), *shape]
    elif a.ndim == 3 and b.ndim == 2:
        shape = shape[1:]
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def _whole(x: Tensor) -> bool:
    return x.dtype in (torch.int64, torch.int32)


def _is_small(x: Tensor) -> bool:
    return x.dtype == torch.bool


def _map(x: Any, fn: Any, found: list[Tensor]) -> Any:
    """x with fn applied to its tensors, in lists and tuples too; `found` collects the results."""
    if isinstance(x, Tensor):
        out = fn(x)
        found.append(out)
        return out
    if isinstance(x, list | tuple) and x and not isinstance(x, torch.Size):
        made = [_map(y, fn, found) for y in x]
        return type(x)(made) if not hasattr(x, "_fields") else type(x)(*made)
    return x


def _flat(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(x, lambda t: t, found)
    return found


def _forget(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What `func` writes to has no values any more, nor has anything that shares its memory."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        for x in _flat([given]):
            value = value_of(x)
            if value is not None:
                value.untyped_storage()._stale = True  # type: ignore[attr-defined]


_LIKE = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.new_empty.default,
}
_CONSTANT = _LIKE | {
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.zeros.default,
    _aten.ones.default,
    _aten.full.default,
    _aten.empty.memory_format,
    _aten.scalar_tensor.default,
}
_DYNAMIC = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.index.Tensor,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}
