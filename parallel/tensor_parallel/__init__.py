"""Layers whose weights are sharded over the tensor-parallel axis, the vocabulary and its loss included.

Whole blocks of a model may not enter.
"""

from parallel.tensor_parallel.heads import SharedHeads, share_heads
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear, VocabEmbedding, enter, leave
from parallel.tensor_parallel.loss import vocab_loss

__all__ = [
    "Linear",
    "SharedHeads",
    "VocabEmbedding",
    "enter",
    "joined_linear",
    "leave",
    "share_heads",
    "vocab_loss",
]
