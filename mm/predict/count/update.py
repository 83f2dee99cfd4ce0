"""Messages of the update: gradients that several ranks hold parts of, and the load of experts."""

from __future__ import annotations

import math

from llm.model import LLM
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint, bare_module
from mm.predict.count.load import axes_of
from mm.predict.work import Message
from parallel.sharding.param import declared
from parallel.sharding.shard import data_dim
from parallel.topology.groups import Group


def update_messages(blueprint: Blueprint, rank: int) -> list[Message]:
    """Those of a rank, but for the one in which all tell their losses and norms: a few numbers."""
    out: list[Message] = []
    stored = blueprint.stored_dtype.itemsize
    for m in blueprint.modules:
        layout = blueprint.layouts[m]
        if rank not in layout.ranks or m in blueprint.frozen:
            continue
        partial = tied = 0
        layers = 0
        at = layout.coord(rank)
        for s in range(at.pp, len(blueprint.stages[m]), layout.pp):
            made = bare_module(blueprint, m, axes_of(layout, at), blueprint.stages[m][s])
            layers += len(made.moe_layers()) if isinstance(made, LLM) else 0
            shards = blueprint.shards(m).dense
            index = (at.dp * layout.cp + at.cp) % shards
            for name, p, spec in declared(made):
                if not p.requires_grad or spec.view != "dense":
                    continue
                shape = list(p.shape)
                over = [spec.shard_dim] if spec.shard_dim is not None and layout.tp > 1 else []
                for k in over:
                    shape[k] //= layout.tp
                size = _own(shape, over, shards, index) * stored
                if m == SINK and name in blueprint.shared and layout.pp > 1 and at.pp in (0, layout.pp - 1):
                    tied += size
                if layout.tp > 1 and not over and spec.partial:
                    partial += size
        if partial:
            out.append(Message("all_reduce", Group("module", m, "tp"), partial))
        if tied:
            out.append(Message("all_reduce", Group("module", m, "ends"), tied))
        if layers and layout.size // layout.pp > 1:
            size = layers * blueprint.llm.n_experts * 8
            out.append(Message("all_reduce", Group("module", m, "stage"), size))
    return out


def _own(shape: list[int], sharded: list[int], shards: int, index: int) -> int:
    """Elements of a data rank's shard."""
    if not shape:
        return 1
    dim = data_dim(tuple(shape), sharded, shards)
    each = -(-shape[dim] // shards)
    own = min(each, max(0, shape[dim] - each * index))
    return math.prod(shape) // max(shape[dim], 1) * own
