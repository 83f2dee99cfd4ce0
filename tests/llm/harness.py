"""A tiny language model, sharded by hand over gloo ranks, and its gradients put together again.

Each declared parameter is replaced by this rank's plain shard, so these tests need neither FSDP nor DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.counts import Counts
from llm.model import LLM, LLMBatch
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes, Axis
from parallel.topology.process_groups import ordered_group

TINY = LLMConfig(
    pattern="ME*-E",
    d_model=16,
    vocab_size=24,
    n_heads=8,
    n_kv_heads=4,
    head_dim=4,
    mamba_heads=8,
    mamba_head_dim=6,
    mamba_state=5,
    mamba_groups=4,
    chunk=8,
    n_experts=8,
    top_k=3,
    expert_ffn=12,
    shared_ffn=8,
    mlp_ffn=20,
    init_std=0.2,
    loss_chunk=7,
)


def tiny(**changes: Any) -> LLMConfig:
    """The tiny model with some fields changed."""
    return replace(TINY, **changes)


# Every option at once that changes what is computed.
EVERYTHING = tiny(
    pattern="E-M*E",
    latent=8,
    expert_groups=4,
    top_groups=3,
    mlp_gated=True,
    mlp_bias=True,
    activation="silu",
    attention_bias=True,
    rope_theta=100.0,
    aux_weight=0.3,
    z_weight=0.2,
    mtp_layers=2,
    tied=True,
)


@dataclass(frozen=True)
class Degrees:
    """Layout of a test: world ranks, dense view dp x tp, expert view edp x ep, fastest axis last."""

    world: int
    tp: int = 1
    ep: int = 1
    sp: bool = False

    @property
    def dp(self) -> int:
        return self.world // self.tp


@dataclass(frozen=True)
class Text:
    """A data-parallel rank's documents, the padding behind them, and the positions where rows enter."""

    lengths: tuple[int, ...]
    padding: int
    seed: int
    rows_at: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.lengths) + self.padding


def axis(name: str, groups: list[list[int]]) -> Axis:
    """This rank's axis over `groups` of global ranks; every rank calls this with the same arguments."""
    rank = dist.get_rank()
    made = [(g, ordered_group(g, timedelta(seconds=60))) for g in groups if len(g) > 1]
    for members, group in made:
        if rank in members:
            return Axis(name, len(members), members.index(rank), group)
    return Axis.single(name)


def make_axes(degrees: Degrees) -> Axes:
    def blocks(n: int) -> list[list[int]]:
        return [list(range(at, at + n)) for at in range(0, degrees.world, n)]

    return Axes(axis("tp", blocks(degrees.tp)), axis("ep", blocks(degrees.ep)), degrees.sp)


def build(cfg: LLMConfig, axes: Axes | None = None, dtype: torch.dtype = torch.float64) -> LLM:
    """The model with its initial weights, sharded to this rank's part."""
    axes = axes or Axes()
    model = LLM(cfg, axes, dtype=dtype)
    initialise(model, 3, "llm")
    shard_by_hand(model, axes)
    for i, moe in enumerate(model.moe_layers()):
        # Far from zero, so that choosing with the bias differs from weighting without it.
        moe.expert_bias.copy_(0.2 * torch.cos(torch.arange(cfg.n_experts) * (i + 1.0)))
    return model


def shard_by_hand(module: nn.Module, axes: Axes) -> None:
    """Replace every declared parameter of `module` by this rank's plain shard."""
    for full, param, spec in list(declared(module)):
        over = axes.tp if spec.view == "dense" else axes.ep
        shard = param.detach()
        for dim, axis_of_dim in ((spec.shard_dim, over), (spec.etp_dim, axes.etp)):
            if dim is not None:
                shard = shard.chunk(axis_of_dim.size, dim)[axis_of_dim.rank]
        owner, _, name = full.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(shard.clone()))


def make_batch(text: Text, vocab: int, axes: Axes | None = None) -> tuple[LLMBatch, list[int]]:
    """The text as this rank's batch, and which of the text's rows enter in its token share."""
    axes = axes or Axes()
    gen = torch.Generator().manual_seed(text.seed)
    n_real = sum(text.lengths)
    ids = torch.randint(0, vocab, (text.total,), generator=gen)
    labels = torch.randint(0, vocab, (text.total,), generator=gen)
    labels[torch.rand(text.total, generator=gen) < 0.3] = -100
    labels[n_real:] = -100
    width = text.total // axes.token_shards
    first = axes.tp.rank * width if axes.sequence_parallel else 0
    mine = [i for i, at in enumerate(text.rows_at) if first <= at < first + width]
    positions = torch.tensor([text.rows_at[i] - first for i in mine], dtype=torch.int64)
    lengths = [*text.lengths, text.padding] if text.padding else text.lengths
    return LLMBatch(ids, labels, Packing.of(lengths), n_real, {"vision": positions}), mine


def make_rows(text: Text, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Encoder rows [R, width] of the text."""
    gen = torch.Generator().manual_seed(text.seed + 1)
    return torch.randn(len(text.rows_at), width, generator=gen, dtype=torch.float64).to(dtype)


def weigh(loss: Tensor) -> Tensor:
    """A scalar in which every token counts differently."""
    return (loss * torch.cos(torch.arange(len(loss), dtype=loss.dtype))).sum()


def run_text(model: LLM, text: Text) -> dict[str, Any]:
    """Forward and backward of one text; gradients accumulate in the model."""
    dtype = model.head_weight().dtype
    batch, mine = make_batch(text, model.cfg.vocab_size, model.axes)
    batch = replace(batch, counts=Counts(10, (7, 4)[: model.cfg.mtp_layers]))
    rows = make_rows(text, model.cfg.d_model, dtype)[mine].requires_grad_()
    loss = model(batch, {"vision": rows})
    weigh(loss).backward()
    return {"loss": loss.detach(), "rows": dict(zip(mine, rows.grad, strict=True))}


def run_rank(cfg: LLMConfig, degrees: Degrees, texts: list[Text], recompute: bool) -> dict[str, Any]:
    """What one rank computes of its text, with its local gradients and where they belong."""
    axes = make_axes(degrees)
    model = build(cfg, axes)
    model.recompute = recompute
    out = run_text(model, texts[dist.get_rank() // degrees.tp])
    missing = [n for n, p, _ in declared(model) if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return out | {
        "tp": axes.tp.rank,
        "ep": axes.ep.rank,
        "grads": {name: p.grad for name, p, _ in declared(model)},
        "load": [m.load for m in model.moe_layers()],
        "objectives": model.take_objectives(),
    }


def run_whole(cfg: LLMConfig, texts: list[Text]) -> dict[str, Any]:
    """The same texts in one process, one after another."""
    model = build(cfg)
    outs = [run_text(model, text) for text in texts]
    return {
        "loss": [o["loss"] for o in outs],
        "rows": [o["rows"] for o in outs],
        "grads": {name: p.grad for name, p, _ in declared(model)},
        "load": [m.load for m in model.moe_layers()],
        "objectives": model.take_objectives(),
    }


def assemble(cfg: LLMConfig, degrees: Degrees, results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of global shape from those of the ranks, summed as the trainer sums them."""
    # Axes only decide which gradients are partial; they need no group for that.
    fake = Axes(_shape_only("tp", degrees.tp), _shape_only("ep", degrees.ep), degrees.sp)
    out = {}
    for name, _, spec in declared(LLM(cfg, fake, device="meta")):
        key, size = ("tp", degrees.tp) if spec.view == "dense" else ("ep", degrees.ep)
        shards: list[Tensor] = [
            torch.stack([r["grads"][name] for r in results if r[key] == i]).sum(0) for i in range(size)
        ]
        if spec.shard_dim is not None:
            out[name] = torch.cat(shards, spec.shard_dim)
        elif spec.partial:
            out[name] = torch.stack(shards).sum(0)
        else:
            for other in shards[1:]:
                torch.testing.assert_close(other, shards[0], rtol=1e-9, atol=1e-12, msg=f"{name} over tp")
            out[name] = shards[0]
    return out


def _shape_only(name: str, size: int) -> Axis:
    fake: Any = object()
    return Axis(name, size, 0, fake)


def far(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Names whose tensors differ by more than 1e-9 of their largest element."""
    assert ours.keys() == theirs.keys()
    errors = {
        name: float((ours[name] - t).abs().max() / t.abs().max().clamp(min=1e-12)) if t.numel() else 0.0
        for name, t in theirs.items()
    }
    return {name: e for name, e in errors.items() if not e < 1e-9}
