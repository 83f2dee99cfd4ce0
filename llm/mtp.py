"""Multi-token prediction: one stored block that predicts one more token each time it is applied.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) with the shared block of Nemotron 3 (arXiv 2512.20856, section
2.3). Token i of depth k knows the tokens up to i + k and predicts token i + k + 1:
h_k = block(W [norm(embedding of token i + k), norm(h_k-1)]).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.layer import Layer, run_layer
from llm.moe import ForwardContext
from llm.norm import RMSNorm
from parallel.sequence.packed import Packing
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes

IGNORE = -100


def ahead(ids: Tensor, labels: Tensor, packing: Packing, depths: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ahead: both [depths, T], row k - 1 those k tokens later in the same document.

    ids, labels [T] of a whole stream, int64. Where the document ends before, the id is 0 and the label
    IGNORE, so that nothing is learned across an edge. A stream that is cut over cp is rolled before the cut.
    """
    # The last token of each token's document.
    left = torch.from_numpy(packing.starts[1:]).to(ids.device)[packing.sequence_id] - 1
    at = torch.arange(len(ids), device=ids.device)
    there = at + torch.arange(1, depths + 1, device=ids.device).unsqueeze(1)  # [depths, T]
    inside = there <= left
    source = torch.where(inside, there, at)
    return torch.where(inside, ids[source], 0), torch.where(inside, labels[source], IGNORE)


class MultiToken(nn.Module):
    """The block; its head and embedding are those of the model."""

    def __init__(
        self, cfg: LLMConfig, axes: Axes, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        d, sp = cfg.d_model, axes.sequence_parallel
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        self.embed_norm = RMSNorm(d, cfg.norm_eps, partial=sp, **factory)
        self.hidden_norm = RMSNorm(d, cfg.norm_eps, partial=sp, **factory)
        # Whole on each tp rank: it works on tokens as kept between blocks and needs no exchange.
        self.join = Linear(2 * d, d, normal(cfg.init_std), partial=sp, **factory)
        self.layers = nn.ModuleList(Layer(s, cfg, axes, **factory) for s in cfg.mtp_pattern)
        self.norm = RMSNorm(d, cfg.norm_eps, partial=sp, **factory)

    def forward(self, hidden: Tensor, embedded: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states [T', d] of the next depth from those of the one before, normed, and embedded [T', d],
        the embeddings of the tokens ahead."""
        x = self.join(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = run_layer(layer, x, ctx)
        out: Tensor = self.norm(x)
        return out
