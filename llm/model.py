"""The language model: embedding, a pattern of layers with one residual branch each, untied head and loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.attention import Attention
from llm.config import LLMConfig, check
from llm.mamba import Mamba, ScanScalars
from llm.mlp import MLP
from llm.moe import MoE, Router
from llm.norm import RMSNorm
from parallel.axis import Axes
from parallel.packed import Packing
from parallel.param import declare, local, normal
from parallel.tensor import VocabEmbedding, enter, leave
from parallel.vocab_loss import vocab_loss


@dataclass(frozen=True)
class LLMBatch:
    """Packed documents of one data-parallel rank.

    ids [T] int64, anything where an encoder row enters; labels [T] int64, the next token or -100;
    packing: the documents, the last of them the padding if there is any; T is a multiple of tp, T >= 1;
    n_real: tokens before the padding; places: edge -> rows of this rank's token share [R] int64 where the
    edge's rows enter, in their order.
    """

    ids: Tensor
    labels: Tensor
    packing: Packing
    n_real: int
    places: Mapping[str, Tensor]


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(
        self,
        symbol: str,
        cfg: LLMConfig,
        axes: Axes,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(
            cfg.d_model, cfg.norm_eps, partial=axes.sequence_parallel, device=device, dtype=dtype
        )
        self.mixer: nn.Module
        if symbol == "M":
            self.mixer = Mamba(cfg, axes, device=device, dtype=dtype)
        elif symbol == "*":
            self.mixer = Attention(cfg, axes, device=device, dtype=dtype)
        elif symbol == "E":
            self.mixer = MoE(cfg, axes, device=device, dtype=dtype)
        else:
            self.mixer = MLP(
                cfg.d_model,
                cfg.mlp_ffn,
                axes,
                std=cfg.init_std,
                out_std=cfg.out_std,
                device=device,
                dtype=dtype,
            )

    def forward(self, x: Tensor, packing: Packing, n_real: int) -> Tensor:
        h = self.norm(x)
        if isinstance(self.mixer, MoE):
            return x + self.mixer(h, n_real)
        if isinstance(self.mixer, MLP):
            return x + self.mixer(h)
        return x + self.mixer(h, packing)


class LLM(nn.Module):
    """Hybrid language model (see LLMConfig). axes: what it is cut over; parameters have global shapes until
    parallel.shard cuts them. recompute: layers keep their input only and run again in the backward."""

    def __init__(
        self,
        cfg: LLMConfig,
        axes: Axes | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axes = axes or Axes()
        check(cfg, axes.tp.size, axes.ep.size)
        self.cfg, self.axes, self.recompute = cfg, axes, False
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = VocabEmbedding(cfg.vocab_size, cfg.d_model, normal(cfg.init_std), axes.tp, **kw)
        self.layers = nn.ModuleList(Layer(s, cfg, axes, **kw) for s in cfg.symbols)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, partial=axes.sequence_parallel, **kw)
        declare(self, "head", (cfg.vocab_size, cfg.d_model), normal(cfg.init_std), shard_dim=0, **kw)

    def forward(self, batch: LLMBatch, rows: Mapping[str, Tensor]) -> Tensor:
        """Loss of each token [T], zero where unsupervised, equal on all tp ranks.

        rows: edge -> encoder rows [R, d_model] for this rank's token share, as batch.places says.
        """
        x = leave(self.embed(batch.ids), self.axes)
        for edge, places in batch.places.items():
            x = x.index_copy(0, places, rows[edge].to(x.dtype))
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, batch.packing, batch.n_real, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, batch.packing, batch.n_real)
        if self.training and torch.is_grad_enabled():
            for moe in self.moe_layers():
                moe.count()
        hidden = enter(self.norm(x), self.axes)
        return vocab_loss(hidden, local(self.head), batch.labels, self.axes.tp, self.cfg.loss_chunk)

    def moe_layers(self) -> list[MoE]:
        """The mixtures of experts, in order."""
        return [m for m in self.modules() if isinstance(m, MoE)]


def precise_modules(model: LLM) -> list[nn.Module]:
    """Modules whose weights stay in the stored dtype when the rest computes in bfloat16."""
    return [m for m in model.modules() if isinstance(m, Router | ScanScalars)]
