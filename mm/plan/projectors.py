"""Projectors of a config: what they compute, and what they refuse."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mm.config.schema import ProjectorConfig
from parallel.topology.layout import check_divides

if TYPE_CHECKING:
    from encoders.projector import ProjectorKind
    from mm.plan.inputs import Resample


def projector_kind(projector: ProjectorConfig) -> ProjectorKind:
    """What a projector of the config computes."""
    from encoders.projector import ProjectorKind
    from encoders.resampler import Sizes

    p = projector
    sizes = Sizes(p.queries, p.depth, p.heads, p.kv_heads, p.head_dim)
    return ProjectorKind(p.kind, p.activation, p.bias, p.norm, sizes)


def check_projector(module: str, projector: ProjectorConfig, tp: int, d_out: int) -> None:
    """Raise Unfit where tp does not divide what a projector shards over it, ValueError for what no resampler
    can be."""
    key = f"model.{module}.projector"
    if projector.kind in ("mlp", "resampler"):
        check_divides(f"{key}.hidden", projector.hidden, "tp", tp, module)
    if projector.kind != "resampler":
        return
    check_divides(f"{key}.heads", projector.heads, "kv_heads", projector.kv_heads)
    check_divides(f"{key}.kv_heads", projector.kv_heads, "tp", tp, module)
    check_divides("4 times model.llm.d_model", 4 * d_out, "tp", tp, module)
    if projector.bias:
        raise ValueError(f"{key}.bias=true with kind=resampler, which has none; needed: bias=false")


def resampling(projector: ProjectorConfig, d_in: int, d_out: int) -> Resample | None:
    """For the rows of an item's features, those of its resampler and its FLOPs; None where there is none."""
    kind = projector_kind(projector)
    if kind.kind != "resampler":
        return None
    return partial(kind.resampled, d_in=d_in, hidden=projector.hidden, d_out=d_out)
