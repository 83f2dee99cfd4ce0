"""Finds where the host would wait for a device, on a machine that has none.

An operator waits if its result on the host, or the shape of its result, depends on values on the device;
torch tags these operators. Where a job runs on CPUs they cost nothing, so nobody would notice. What has no
operator on CPUs is seen by its name: reads of whole tensors, and tensors and indices made of lists and
arrays, which would be copied to the device from pageable memory.

    with HostWaits() as waits:
        run_step(..)
    waits.places    # [Place(file, function, line, operator), ..], one for each wait, in their order

Only what the thread that enters the context does is seen. Backwards on CPUs run in it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pages import PACKAGES, ROOT

TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READS = ("tolist", "cpu", "__setitem__")
UPLOADS = ("tensor", "as_tensor", "from_numpy")
ONE_WAY = "parallel/sequence/host.py"  # copies from the host without a wait


class Place(NamedTuple):
    """The innermost line of our packages that made the host wait, and the operator."""

    file: str
    function: str
    line: int
    operator: str


class HostWaits:
    """A context that records host waits. places: so far."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._open = ExitStack()

    def __enter__(self) -> HostWaits:
        self._thread = threading.get_ident()
        self._open.enter_context(_Operators(self._found))
        self._open.enter_context(_Indexing(self._found))
        for owner, names in ((Tensor, READS), (torch, UPLOADS)):
            for name in names:
                self._open.enter_context(mock.patch.object(owner, name, self._watched(owner, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def by_function(self) -> Counter[str]:
        """How many waits each function made, as "file:function"."""
        return Counter(f"{p.file}:{p.function}" for p in self.places)

    def _watched(self, owner: Any, name: str) -> Callable[..., Any]:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name != "__setitem__" or _from_host(args[1]):
                self._found(name)
            return real(*args, **kwargs)

        call.__dict__["real"] = real
        return call

    def _found(self, operator: str) -> None:
        place = _place(operator)
        if threading.get_ident() == self._thread and not (operator in UPLOADS and place.file == ONE_WAY):
            self.places.append(place)


class _Indexing(TorchFunctionMode):
    """Sees Tensor.__getitem__, but not inside a backward. It is not patched, since that cannot be undone: the
    type stays changed, and torch.tensor() refuses numbers that are tensors from then on."""

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and _from_host(args[1]):
            self.found("__getitem__")
        # What is patched is found by its name in the class, and has been seen already.
        return getattr(func, "real", func)(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads(func, args, kwargs):
            self.found(str(func))
        return func(*args, **kwargs)


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator waits with these arguments."""
    name = func.overloadpacket.__name__
    if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple):
        # Numbers as indices give a shape that is known, masks do not.
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    return bool(TAGS & set(func.tags))


def _from_host(index: Any) -> bool:
    """Whether an index has lists or arrays, which are copied to the device."""
    return any(isinstance(p, list | np.ndarray) for p in (index if isinstance(index, tuple) else (index,)))


def _place(operator: str) -> Place:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(tuple(f"{ROOT / package}/" for package in PACKAGES)):
            return Place(file.removeprefix(f"{ROOT}/"), frame.f_code.co_name, frame.f_lineno, operator)
        frame = frame.f_back  # type: ignore[assignment]
    return Place("?", "?", 0, operator)
