"""Layers over a packed stream that is split over context-parallel ranks: attention, convolution, scan.

Weights may not enter: the functions here take tensors, and the layers of llm own the weights.

    packing = pack(lengths, device, axes.cp, order)   packing.py: the documents as one rank sees them
    y = context_attention(q, k, v, packing)           attention.py: by gather or ring; block.py computes
    y = expanded_attention(q, rows, expand, packing)  the same of keys that are made from narrow rows
    y = context_conv(x, weight, bias, packing)        halo.py: fetches the rows before a piece
    begins = begin_states(plan_pieces(packing), ..)   state.py: exchanges the states of a recurrence
    y = to_tokens(f(to_heads(x, packing)), packing)   ulysses.py: whole documents, some heads on each rank

The fetches of every layer are planned once for each packing (packing.once()) and shared by all layers.
"""

from parallel.context_parallel.attention import (
    choose_attention_method,
    context_attention,
    expanded_attention,
    key_costs,
)
from parallel.context_parallel.halo import context_conv, halo_rows
from parallel.context_parallel.packing import ContextPacking, pack
from parallel.context_parallel.state import begin_states, plan_pieces, states_taken
from parallel.context_parallel.ulysses import to_heads, to_tokens

__all__ = [
    "ContextPacking",
    "begin_states",
    "choose_attention_method",
    "context_attention",
    "context_conv",
    "expanded_attention",
    "halo_rows",
    "key_costs",
    "pack",
    "plan_pieces",
    "states_taken",
    "to_heads",
    "to_tokens",
]
