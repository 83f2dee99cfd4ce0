"""Layers over a packed stream that is split over context-parallel ranks: attention, convolution, scan.

What they fetch is planned once a batch. Weights may not enter.
"""

from parallel.context_parallel.attention import context_attention
from parallel.context_parallel.halo import context_conv
from parallel.context_parallel.packing import ContextPacking, pack

__all__ = [
    "ContextPacking",
    "context_attention",
    "context_conv",
    "pack",
]
