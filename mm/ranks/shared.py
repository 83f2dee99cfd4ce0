"""Memory that a rank shares with its workers: they write the tensors of a batch to where the batch has them.

A batch that lay in memory of the rank's own would cost the rank a copy of each tensor and the first touch of
each page. Ranges of this memory are used again, so their pages are touched once.
"""

from __future__ import annotations

import math
import mmap
import weakref
from bisect import insort
from collections import deque

import numpy as np
import torch
from torch import Tensor

ALIGN = 64  # bytes; of what lies in shared memory


class SharedMemory:
    """`size` bytes of addresses that have no name anywhere; memory is taken for the pages that are used.

    It is made before the workers are forked. One thread takes ranges of it; tensors may end in any.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self._size, self._start = size, np.frombuffer(self._memory, np.uint8).ctypes.data
        self._free = [(0, size)]  # ranges [start, stop), ascending; no two touch
        self._back: deque[tuple[int, int]] = deque()  # ranges whose tensors have ended

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values, whose range is free again when nothing has its memory any more.

        Where no range is large enough it is in memory of the process's own.
        """
        size = dtype.itemsize * math.prod(shape)
        at = self._take(-(-size // ALIGN) * ALIGN) if size else None
        if at is None:
            return torch.empty(shape, dtype=dtype)
        own = np.frombuffer(self._memory, np.uint8, size, at)
        # A deque is given to by any thread, in the middle of whatever it does, without a lock.
        end = weakref.finalize(own, self._back.append, (at, at + -(-size // ALIGN) * ALIGN))
        end.atexit = False
        return torch.from_numpy(own).view(dtype).view(shape)  # keeps `own` while its memory is used

    def place(self, tensor: Tensor) -> tuple[int, int] | None:
        """Where a contiguous tensor lies: its first byte and how many; None for one that is elsewhere."""
        at = tensor.data_ptr() - self._start
        return (at, tensor.nbytes) if 0 <= at < self._size else None

    def bytes_at(self, at: int, size: int) -> Tensor:
        """`size` bytes from byte `at` on: uint8 [size]."""
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=at)

    def write(self, at: int, bits: np.ndarray) -> None:
        """Write bytes, uint8 [n], from byte `at` on."""
        np.frombuffer(self._memory, np.uint8, bits.size, at)[:] = bits

    def _take(self, size: int) -> int | None:
        while self._back:
            self._give_back(self._back.popleft())
        for n, (start, stop) in enumerate(self._free):
            if stop - start >= size:  # the first that fits, so that what is used lies together
                self._free[n : n + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def _give_back(self, own: tuple[int, int]) -> None:
        insort(self._free, own)
        n = self._free.index(own)
        first, last = n, n + 1
        if n and self._free[n - 1][1] == own[0]:
            first = n - 1
        if last < len(self._free) and self._free[last][0] == own[1]:
            last += 1
        self._free[first:last] = [(self._free[first][0], self._free[last - 1][1])]
