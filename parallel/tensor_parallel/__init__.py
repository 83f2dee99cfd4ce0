"""Layers whose weights are sharded over the tensor-parallel axis, including the vocabulary and its loss.

Whole blocks of a model may not enter: llm and encoders compose them from these parts.

    x = enter(x, axes)                   layers.py: tokens as kept between blocks -> all tokens
    h = Linear(.., shard="column")(x)    layers.py: this rank's output features
    y = Linear(.., shard="row")(h)       layers.py: this rank's partial sum
    y = leave(y, axes)                   layers.py: summed, back to tokens as kept between blocks

Further parts: VocabEmbedding (layers.py) and vocab_loss (loss.py) shard the vocabulary; share_heads
(heads.py) shards heads that share a key/value head or a scan group; joined_linear (joined.py) is one product
with several weights.
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
