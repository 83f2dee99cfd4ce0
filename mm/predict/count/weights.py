"""What data ranks hold and send of a stage's weights. Sizes are those of FSDP's buffers (mm.plan.weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.data_parallel import gathers
from mm.plan.weights import Unit, Weight
from mm.predict.work import Message
from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    Kind,
)
from parallel.topology.data_parallel import Holding
from parallel.topology.groups import DataAxes, Group, parameter_axes

_ENTERING = (FORWARD, BACKWARD, BACKWARD_INPUT)
_LEARNING = (BACKWARD, BACKWARD_WEIGHT)


class Owned(NamedTuple):
    """A unit of FSDP, with the axes of its groups. depths: how often a forward computes it: weights of the
    block of multi-token prediction once a depth, and FSDP frees them after each in a backward."""

    unit: Unit
    axes: DataAxes
    depths: int = 1

    @property
    def parameters(self) -> int:
        """Elements that this rank keeps."""
        return self.unit.shard.every


def owned(blueprint: Blueprint, module: str, stage: int) -> list[Owned]:
    """The units of a stage (Blueprint.units)."""
    weights = blueprint.weights(module, stage)
    experts = any(w.expert for unit in weights for w in unit)
    both = parameter_axes(blueprint.layouts[module], blueprint.shards(module), experts=experts)
    units = blueprint.units(module, stage)
    deep = _multi_token(blueprint, weights) if module == SINK and blueprint.stages[SINK][stage].last else ()
    return [
        Owned(unit, both[-1] if own[0].expert else both[0], blueprint.llm.mtp_layers if k in deep else 1)
        for k, (unit, own) in enumerate(zip(units, weights, strict=True))
    ]


def _multi_token(blueprint: Blueprint, weights: Sequence[Sequence[Weight]]) -> set[int]:
    """Units inside the block of multi-token prediction, the last of each kind of stage_weights()."""
    llm, item = blueprint.llm, blueprint.dtype.itemsize
    first = [own[0] for own in weights]
    kinds = {
        "E": [k for k, w in enumerate(first) if w.expert],
        "EM": [k for k, w in enumerate(first) if not w.expert and not w.own_layer and w.item != item],
        "EM*-": [k for k, w in enumerate(first) if w.own_layer],
    }
    inside = llm.mtp_pattern if llm.mtp_layers else ""
    found: set[int] = set()
    for symbols, units in kinds.items():
        n = sum(symbol in symbols for symbol in inside)
        found |= set(units[len(units) - n :]) if n else set()
    return found


def gather_messages(
    units: Sequence[Owned], module: str, holding: Holding, actions: Sequence[Action]
) -> tuple[Message, ...]:
    """The gathers of a step of a stage. actions: of the stage, in order."""
    learns = any(o.unit.shard.trained for o in units)
    out = []
    for unit, axes, depths in units:
        n = int(bool(actions))
        if holding.params == "each":
            n = gathers([a for a in actions if a.kind in _ENTERING], unit.own_layer)
            more = n if unit.own_layer else sum(a.kind in (BACKWARD, BACKWARD_INPUT) for a in actions)
            n += (depths - 1) * more
        elif holding.params == "replicated":
            n = int(learns)  # after every update, whether a step had items for the module or not
        if unit.shards > 1 and n:
            out.append(Message("all_gather", Group("module", module, axes.shard), unit.gathered, n))
    return tuple(out)


def sum_messages(
    units: Sequence[Owned], module: str, holding: Holding, actions: Sequence[Action], stored: int
) -> tuple[Message, ...]:
    """The sums of gradients of a step of a stage. stored: bytes of an element of them."""
    backwards = sum(a.kind in _LEARNING for a in actions)
    out = []
    late = any(a.kind is Kind.GRAD_SYNC for a in actions)
    for unit, axes, depths in units:
        if not (unit.shard.trained and backwards):
            continue
        n = backwards if holding.sums == "backward" else 1
        # What earlier backwards have added up is summed where the last one first frees the weights.
        n += depths > 1 and n == 1 < backwards and not late
        if unit.shards > 1:
            whole = unit.shard.trained * unit.shards * stored
            out.append(Message("reduce_scatter", Group("module", module, axes.shard), whole, n))
        if unit.replicas > 1:
            size = unit.shard.trained * stored
            out.append(Message("all_reduce", Group("module", module, axes.replica), size, 1))
    return tuple(out)
