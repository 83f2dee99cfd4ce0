"""Sequences packed end to end on one rank: index arithmetic, attention and convolution within each sequence.

Everything here is local. No process group may enter.
"""

from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.grid import RowGrid, grid_positions
from parallel.sequence.intervals import Rows, Span
from parallel.sequence.packed import Packing, attention, depthwise_conv
from parallel.sequence.stream import Order, alignment, context_spans, piece_count

__all__ = [
    "Order",
    "Packing",
    "Pairing",
    "RowGrid",
    "Rows",
    "Span",
    "alignment",
    "attend",
    "attention",
    "context_spans",
    "depthwise_conv",
    "grid_positions",
    "piece_count",
]
