"""Context parallelism: a sequence's tokens cut over ranks."""

from parallel.context.shard import Order, context_spans, piece_count

__all__ = ["Order", "context_spans", "piece_count"]
