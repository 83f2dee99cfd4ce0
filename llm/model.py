"""The language model: embedding, a pattern of layers with one residual branch each, head and loss.

An instance may be one stage of a pipeline; it then holds some of the layers, under their global names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm.attention import Attention
from llm.balance import attach
from llm.checks import check
from llm.config import LLMConfig, embeds_last
from llm.counts import Counts
from llm.layer import Layer, run_layer
from llm.mamba import Mamba, ScanScalars
from llm.mla import LatentAttention
from llm.moe import ForwardContext, MoE, Router
from llm.mtp import MultiToken, ahead
from llm.norm import RMSNorm
from llm.recompute import recompute_parts
from llm.stages import levels_of
from parallel.expert_parallel.routing import Table
from parallel.sequence.packed import Packing
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, declare, declare_buffer, local, normal
from parallel.tensor_parallel.layers import VocabEmbedding, enter, leave
from parallel.tensor_parallel.loss import vocab_loss
from parallel.topology.axis import Axes
from parallel.topology.stage import Stage, whole


@dataclass(frozen=True)
class LLMBatch:
    """Packed documents of one data-parallel rank: T >= 1 tokens, a multiple of tp."""

    ids: Tensor
    """[T] int64; the placeholder's id where an encoder row enters."""
    labels: Tensor
    """[T] int64: the next token, or -100 where there is no loss."""
    packing: Packing
    """The documents in order; padding is a last document of its own."""
    n_real: int
    """Tokens before the padding."""
    row_positions: Mapping[str, Tensor]
    """By edge, [R] int64: where its rows enter, in their order, as indices into this rank's token share."""
    counts: Counts = field(default_factory=Counts)
    """Numbers of tokens that objectives other than the next token's loss are means over."""
    ahead: tuple[Tensor, Tensor] | None = None
    """llm.mtp.ahead() of ids and labels. Needed under context parallelism; else None, and made here."""
    routed: Table | None = None
    """routed_tokens() of the ranks that share experts; None: layers that need it exchange it."""
    loss_rows: tuple[Tensor, ...] | None = None
    """loss_rows() of the labels, so that the head computes no other tokens; None: it computes all."""


def loss_rows(labels: Tensor, mtp_labels: Tensor | None = None) -> tuple[Tensor, ...]:
    """Indices [S] int64 of tokens with a loss: in labels [T], then in each row of mtp_labels [depths, T].

    Labels should be on the host: on a device, counting them would wait for it. Encoder rows, questions and
    padding have no loss; they are most tokens of many multimodal samples.
    """
    every = [labels] if mtp_labels is None else [labels, *mtp_labels]
    return tuple((row >= 0).nonzero().squeeze(1) for row in every)


class LLM(nn.Module):
    """Hybrid language model (see LLMConfig), or one pipeline stage of it.

    axes: the process groups it is sharded over; parameters have global shapes until shard_module() shards
    them. stage: the layers it holds, all by default. The last stage holds the embedding too, under the same
    name, where its head or multi-token prediction needs it. Raises ValueError where check() does.
    """

    mtp_sum: Tensor

    def __init__(
        self,
        cfg: LLMConfig,
        axes: Axes | None = None,
        *,
        stage: Stage | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axes = axes or Axes()
        check(cfg, axes.tp.size, axes.ep.size, axes.etp.size)
        self.cfg, self.axes = cfg, axes
        self.stage = stage = stage or whole(len(cfg.symbols))
        assert stage.stop <= len(cfg.symbols), (stage, cfg.pattern)
        factory: FactoryKwargs = {"device": device, "dtype": dtype}
        self.embed: VocabEmbedding | None = None
        if stage.first or (stage.last and embeds_last(cfg)):
            self.embed = VocabEmbedding(cfg.vocab_size, cfg.d_model, normal(cfg.init_std), axes.tp, **factory)
        # Named by global index, so that initial weights and checkpoints do not depend on stages.
        self.layers = nn.ModuleList()
        for i in stage.layers:
            self.layers.add_module(str(i), Layer(cfg.symbols[i], cfg, axes, i, **factory))
        self.norm: RMSNorm | None = None
        self.mtp: MultiToken | None = None
        if stage.last:
            self.norm = RMSNorm(cfg, axes, **factory)
            if not cfg.tied:
                head = ParamSpec(normal(cfg.init_std), shard_dim=0, matrix=False)
                declare(self, "head", (cfg.vocab_size, cfg.d_model), head, **factory)
            if cfg.mtp_layers:
                self.mtp = MultiToken(cfg, axes, **factory)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        # This rank's part of the mean loss of multi-token prediction, unweighted, since take_objectives().
        declare_buffer(self, "mtp_sum", (), 0.0, persistent=False, device=device, dtype=acc)
        self._recompute: frozenset[str] = frozenset()
        self._offload: int | None = None

    @property
    def recompute(self) -> frozenset[str]:
        """Parts that are computed again in the backward; can be set to anything recompute_parts() takes."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool | str | Collection[str]) -> None:
        self._recompute = recompute_parts(value)
        for module in self.modules():
            if isinstance(module, Layer | MoE | Attention | LatentAttention | Mamba):
                module.recompute = self._recompute

    @property
    def offload(self) -> int | None:
        """Least size, in bytes, of a tensor that is kept for the backward in host memory; None: none is."""
        return self._offload

    @offload.setter
    def offload(self, min_bytes: int | None) -> None:
        self._offload = min_bytes
        for module in self.modules():
            if isinstance(module, Layer):
                module.offload = min_bytes

    def forward(self, batch: LLMBatch, rows: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """The last stage returns the loss of each token [T], zero where unsupervised, equal on all tp ranks.
        Other stages return hidden states [T', d] for the next stage; T' is T or this rank's share of it.

        rows: by edge, encoder rows [R, d] for this rank's token share at batch.row_positions, or
        [R, levels, d] with the levels that enter at this stage (llm.stages.levels_of), or as many of them as
        the encoder has. Edges without rows are left out. Level 0 enters at the embedding; level k is added
        after layer cfg.level_layers[k - 1]. hidden: the result of the stage before, None on the first.
        """
        learns = self.training and torch.is_grad_enabled() and not self.cfg.freeze
        ctx = ForwardContext(batch.packing, batch.n_real, batch.counts, routed=batch.routed, learns=learns)
        x = self.states(batch, rows, ctx, hidden)
        if not self.stage.last:
            return x
        if self.mtp is not None and learns:
            x = self._with_mtp_loss(self.mtp, x, batch, ctx)
        return self._loss(x, batch.labels, None if batch.loss_rows is None else batch.loss_rows[0])

    def states(
        self, batch: LLMBatch, rows: Mapping[str, Tensor], ctx: ForwardContext, hidden: Tensor | None = None
    ) -> Tensor:
        """Hidden states [T', d] after this stage, normed on the last; see forward."""
        assert (hidden is None) == self.stage.first, "the first stage embeds, the others take hidden states"
        if hidden is None:
            hidden = self.embed_ids(batch.ids)
            for edge, positions in batch.row_positions.items():
                entering = rows[edge] if rows[edge].ndim == 2 else rows[edge][:, 0]
                hidden = hidden.index_copy(0, positions, entering.to(hidden.dtype))
        for i, layer in zip(self.stage.layers, self.layers, strict=True):
            assert isinstance(layer, Layer)
            hidden = run_layer(layer, hidden, ctx)
            hidden = self._add_levels(hidden, i, batch, rows)
        return hidden if self.norm is None else self.norm(hidden)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids [T]: [T, d], or this rank's share of it."""
        assert self.embed is not None
        x = leave(self.embed(ids), self.axes)
        # Rounded to the embedding's dtype, as published models have it: in bfloat16 by up to 0.4 %.
        return x if self.cfg.embed_scale == 1 else x * x.new_full((), self.cfg.embed_scale)

    def head_weight(self) -> Tensor:
        """This tp rank's rows of the head [V / tp, d]."""
        if not self.cfg.tied:
            return local(self.head)
        assert self.embed is not None
        return local(self.embed.weight)

    def _add_levels(self, x: Tensor, layer: int, batch: LLMBatch, rows: Mapping[str, Tensor]) -> Tensor:
        for column, level in enumerate(levels_of(self.cfg, self.stage)):
            if level == 0 or self.cfg.level_layers[level - 1] != layer:
                continue
            for edge, values in rows.items():
                if values.ndim == 3 and column < values.shape[1]:
                    x = x.index_add(0, batch.row_positions[edge], values[:, column].to(x.dtype))
        return x

    def _loss(self, states: Tensor, labels: Tensor, rows: Tensor | None) -> Tensor:
        """Loss of each token [T]; rows: indices of those that have one, None where that is not known."""
        hidden, tokens = enter(states, self.axes), len(labels)
        if rows is not None:
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        cfg, head = self.cfg, self.head_weight()
        loss = vocab_loss(
            hidden, head, labels, self.axes.tp, cfg.loss_chunk, scale=cfg.logit_scale, cap=cfg.logit_cap
        )
        return loss if rows is None else loss.new_zeros(tokens).index_copy(0, rows, loss)

    def _with_mtp_loss(self, block: MultiToken, x: Tensor, batch: LLMBatch, ctx: ForwardContext) -> Tensor:
        """The last states x, whose backward carries the loss of multi-token prediction.

        That loss is the weight times the mean over depths of each depth's mean loss (arXiv 2412.19437,
        equations 24 and 25). A depth's mean is over the tokens that have a loss there. The paper, which
        supervises all tokens, divides by the length of the sequence; here the weight means the same whatever
        share is supervised.
        """
        depths = self.cfg.mtp_layers
        if batch.ahead is None:
            assert self.axes.cp.size == 1, "under cp the batch needs `ahead` (llm.mtp.ahead)"
        ids, labels = batch.ahead or ahead(batch.ids, batch.labels, batch.packing, depths)
        total, states = torch.zeros_like(self.mtp_sum), x
        for k, scale in enumerate(batch.counts.mtp_scales(depths)):
            states = block(states, self.embed_ids(ids[k]), ctx)
            rows = None if batch.loss_rows is None else batch.loss_rows[k + 1]
            total = total + self._loss(states, labels[k], rows).sum() * scale
        self.mtp_sum += total.detach()
        return attach(x, total, self.cfg.mtp_weight)

    def moe_layers(self) -> list[MoE]:
        """The mixtures of experts of this stage, in order."""
        return [m for m in self.modules() if isinstance(m, MoE)]

    @torch.no_grad()
    def take_objectives(self) -> dict[str, Tensor]:
        """This rank's parts of the other objectives since the last call, as unweighted scalars; resets them.

        "balance" and "z" are means over tokens, summed over layers. "mtp" is the mean over depths of means
        over tokens. LLMBatch.counts gives the numbers of tokens. The sum over dp and cp is the value of the
        global batch; "balance" and "z" are summed over tp too, where "mtp" is equal.
        """
        out = {
            "balance": self.mtp_sum.new_zeros(()),
            "z": self.mtp_sum.new_zeros(()),
            "mtp": self.mtp_sum.clone(),
        }
        self.mtp_sum.zero_()
        for moe in self.moe_layers():
            out["balance"] += moe.objectives[0]
            out["z"] += moe.objectives[1]
            moe.objectives.zero_()
        return out


def precise_modules(model: LLM) -> list[nn.Module]:
    """Modules whose weights keep their stored dtype where the rest computes in bfloat16."""
    return [m for m in model.modules() if isinstance(m, Router | ScanScalars)]
