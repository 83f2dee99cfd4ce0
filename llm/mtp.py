"""Multi-token prediction: one stored block that predicts one more token each time it is applied.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) with the shared block of Nemotron 3 (arXiv 2512.20856, section
2.3). At depth k, position i reads the tokens up to i + k and predicts token i + k + 1:
h_k = block(W [norm(embedding of token i + k), norm(h_k-1)]).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.layer import Layer, run_layer
from llm.moe import ForwardContext
from llm.norm import RMSNorm
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes

IGNORE = -100


def ahead(ids: Tensor, labels: Tensor, packing: Packing, depths: int) -> tuple[Tensor, Tensor]:
    """ids and labels ahead, both [depths, T]: row k - 1 has those k tokens later in the same document.

    ids, labels [T]: of a whole stream, int64. Past the end of a document the id is 0 and the label IGNORE, so
    nothing is learned across documents. Under cp call this before the stream is split over the ranks.
    """
    # The last token of each token's document.
    left = to_device(packing.starts[1:], ids.device)[packing.sequence_id] - 1
    at = torch.arange(len(ids), device=ids.device)
    there = at + torch.arange(1, depths + 1, device=ids.device).unsqueeze(1)  # [depths, T]
    inside = there <= left
    source = torch.where(inside, there, at)
    return torch.where(inside, ids[source], 0), torch.where(inside, labels[source], IGNORE)


class MultiToken(nn.Module):
    """The block. It shares embedding and head with the model."""

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, sp = cfg.d_model, axes.sequence_parallel
        self.embed_norm = RMSNorm(cfg, axes, **factory)
        self.hidden_norm = RMSNorm(cfg, axes, **factory)
        # Each tp rank holds it whole and applies it to the tokens that it holds: no exchange.
        self.join = Linear(2 * d, d, normal(cfg.init_std), partial=sp, **factory)
        self.layers = nn.ModuleList(Layer(s, cfg, axes, None, **factory) for s in cfg.mtp_pattern)
        self.norm = RMSNorm(cfg, axes, **factory)

    def forward(self, hidden: Tensor, embedded: Tensor, ctx: ForwardContext) -> Tensor:
        """Normed hidden states [T', d] of the next depth.

        hidden [T', d]: normed states of the depth before; embedded [T', d]: embeddings of the tokens ahead.
        """
        x = self.join(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = run_layer(layer, x, ctx)
        out: Tensor = self.norm(x)
        return out
