"""What this machine does with products, memory, attention and convolutions: processor seconds of one thread.

Each figure is the median of several timings, so that other programs disturb it little. Ranks on a CPU compute
with one thread each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = (4, 16, 48, 96, 192, 384, 768)  # least dims of the products that are timed
LENGTHS = (16, 64, 256, 1024)  # of attention
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)  # of the tensors that are added
HEADS, HEAD_DIM = 8, 32


def seconds(call: Callable[[], object], *, rounds: int = 7, least: float = 4e-3) -> float:
    """Processor seconds of one call: the median of rounds of at least so many seconds each."""
    call()
    times, found = 1, list[float]()
    while len(found) < rounds:
        start = time.process_time()
        for _ in range(times):
            call()
        spent = time.process_time() - start
        if spent < least and not found:
            times *= 2
        else:
            found.append(spent / times)
    return median(found)


def products(dtype: torch.dtype, least: tuple[int, ...] = LEAST) -> dict[int, float]:
    """FLOP/s of products by their least dim."""
    return {d: median(_product(dtype, shape) for shape in _shapes(d)) for d in least}


def _shapes(d: int) -> list[tuple[int, int, int]]:
    """Products (m, n, k) of which the least dim is d, as models have them: tokens times width times width."""
    wide = max(d, min(4 * d, 512))
    return [(max(512, d), wide, d), (max(512, d), d, wide), (wide, d, max(512, d))]


def _product(dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    m, n, k = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    return 2 * m * n * k / seconds(lambda: a @ b)


def grouped(dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of grouped products by their least dim."""
    out = {}
    for d in (8, 48, 192):
        a, b = torch.randn(8 * d, d).to(dtype), torch.randn(8, d, 2 * d).to(dtype)
        ends = torch.arange(1, 9, dtype=torch.int32) * d

        def call(a: Tensor = a, b: Tensor = b, ends: Tensor = ends) -> Tensor:
            return torch._grouped_mm(a, b, ends)

        out[d] = 2 * a.numel() * b.shape[-1] / seconds(call)
    return out


def attention(dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of attention, forward and backward, by length."""
    out = {}
    for length in LENGTHS:
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM).to(dtype).requires_grad_() for _ in range(3))

        def call(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v).sum().backward()  # type: ignore[no-untyped-call]

        # Two products forward and five backward, as the counts have them.
        out[length] = 7 * 2 * HEADS * length * length * HEAD_DIM / seconds(call)
    return out


def convolution(dtype: torch.dtype) -> float:
    """FLOP/s of a convolution."""
    x, w = torch.randn(1, 32, 64, 64).to(dtype), torch.randn(32, 32, 3, 3).to(dtype)
    return 2 * 32 * 32 * 9 * 64 * 64 / seconds(lambda: F.conv2d(x, w, padding=1))


def bandwidth() -> float:
    """Bytes/s that an addition reads and writes."""
    found = []
    for size in BYTES:
        a, b = torch.randn(size // 4), torch.randn(size // 4)
        out = torch.empty_like(a)

        def call(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            return torch.add(a, b, out=out)

        found.append(3 * size / seconds(call))
    return median(found)


def shares(found: Mapping[int, float], peak: float) -> dict[str, list[float]]:
    """A curve of hardware files from FLOP/s by size."""
    return {
        "size": [float(d) for d in found],
        "share": [round(min(1.0, max(1e-4, rate / peak)), 4) for rate in found.values()],
    }
