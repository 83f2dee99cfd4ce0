"""A remembered result is what the operation gives: shapes, strides, dtypes, and whose memory it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.virtual.memo import Memo
from mm.virtual.run import fake_mode

_aten = torch.ops.aten
CALLS: list[tuple[Any, Any]] = [
    (_aten.mm.default, lambda x, y: (x, y)),
    (_aten.add.Tensor, lambda x, y: (x, x)),
    (_aten.add.Tensor, lambda x, y: (x, 1)),
    (_aten.add.Tensor, lambda x, y: (x.to(torch.int64), 1)),
    (_aten.add.Tensor, lambda x, y: (x.to(torch.int64), 1.0)),  # 1 == 1.0, but the results differ
    (_aten.add.Tensor, lambda x, y: (x.to(torch.bool), True)),
    (_aten.add_.Tensor, lambda x, y: (x, 1)),
    (_aten.t.default, lambda x, y: (x,)),
    (_aten.slice.Tensor, lambda x, y: (x, 0, 1, 3)),
    (_aten.slice.Tensor, lambda x, y: (x[1:], 0, 1, 3)),
    (_aten.view.default, lambda x, y: (x, [-1])),
    (_aten.expand.default, lambda x, y: (x.unsqueeze(0), [5, -1, -1])),
    (_aten.split.Tensor, lambda x, y: (x, 3)),
    (_aten.unbind.int, lambda x, y: (x, 1)),
    (_aten.unbind.int, lambda x, y: (x[:0], 0)),  # a list of no tensors
    (_aten.clone.default, lambda x, y: (x.t(),)),
    (_aten.clone.default, lambda x, y: (x.unsqueeze(0).expand(3, -1, -1),)),
    (_aten.empty_like.default, lambda x, y: (y,)),
    (_aten.new_empty.default, lambda x, y: (x, [0, 7])),
    (_aten.cat.default, lambda x, y: ([x, y.t()],)),
    (_aten.cat.default, lambda x, y: ([x, y.t()], 1)),
    (_aten.native_layer_norm.default, lambda x, y: (x, [6], None, None, 1e-5)),
    (_aten.topk.default, lambda x, y: (x, 2)),
    (_aten._to_copy.default, lambda x, y: (x,)),
    (_aten.detach.default, lambda x, y: (x,)),
    (_aten.index_select.default, lambda x, y: (x, 0, torch.zeros(min(9, len(x)), dtype=torch.int64))),
]


def described(out: Any, given: Sequence[Tensor]) -> list[object]:
    """Of each tensor of a result: all that memory and later shapes follow from."""
    storages = [x.untyped_storage()._cdata for x in given]
    found: list[object] = [type(out)] if isinstance(out, list | tuple) else []
    for x in out if isinstance(out, list | tuple) else [out]:
        own = x.untyped_storage()
        base = storages.index(own._cdata) if own._cdata in storages else None
        size = None if base is not None else own.nbytes()
        found.append((tuple(x.shape), x.stride(), x.storage_offset(), x.dtype, base, size))
    return found


@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (1, 6)])
def test_a_remembered_result_is_that_of_real_tensors(shape: tuple[int, int]) -> None:
    fake = fake_mode()
    memo = Memo(fake)
    for again in (False, True):  # the second round remembers
        for func, make in CALLS:
            x, y = torch.ones(shape), torch.ones(shape[::-1])
            if func is _aten.slice.Tensor and shape[0] < 4:
                continue
            args = make(x, y)
            given = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            ours = [fake.from_tensor(t) for t in given]
            swap: dict[int, Any] = {id(t): f for t, f in zip(given, ours, strict=True)}
            faked = tuple(
                [swap.get(id(t), t) for t in a] if isinstance(a, list) else swap.get(id(a), a) for a in args
            )
            with fake:
                out = memo.run(func, faked, {}, list(ours))
            assert described(out, ours) == described(func(*args), given), (func, again)
    assert sum(known is not None for known in memo._known.values()) > len(CALLS) // 2
