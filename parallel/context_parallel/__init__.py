"""Context parallelism: a sequence's tokens cut over ranks."""

from parallel.context_parallel.attention import context_attention
from parallel.context_parallel.packing import ContextPacking, pack
from parallel.sequence.stream import Order, context_spans, piece_count

__all__ = ["ContextPacking", "Order", "context_attention", "context_spans", "pack", "piece_count"]
