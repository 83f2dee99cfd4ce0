"""Layers over a packed stream that is split over context-parallel ranks: attention, convolution, scan.

Weights may not enter: the functions here take tensors, and the layers of llm own the weights.

    packing = pack(lengths, device, axes.cp, order)   packing.py: documents, as one rank sees them; once a
    batch y = context_attention(q, k, v, packing)           attention.py: by gather or ring; block.py: one
    block of keys y = context_conv(x, weight, bias, packing)        halo.py: fetches the rows before a piece
    begins = begin_states(plan_pieces(packing), ..)   state.py: exchanges the states of a recurrence y =
    to_tokens(f(to_heads(x, packing)), packing)   ulysses.py: whole documents, some heads on each rank

The fetches of every layer are planned once for each packing (packing.once()) and shared by all layers.
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
