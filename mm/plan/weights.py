"""A stage's weights as its ranks hold them, and which of them FSDP gathers at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from encoders.module import EncoderModule
from llm.model import LLM, precise_modules
from parallel.sharding.optim import state_bytes
from parallel.sharding.param import ParamSpec, declared, own_specs
from parallel.sharding.rules import AdamW, Muon
from parallel.sharding.shard import data_dim
from parallel.topology.data_parallel import Policy, Shards
from parallel.topology.layout import Layout

# Whole weights and gradients of a module on a rank, in bytes, up to which the default policy keeps them for a
# step: of an encoder a twentieth of a device with 80 GB, of the language model a fifth.
MOST_HELD_ENCODER, MOST_HELD_LLM = 4 * 2**30, 16 * 2**30


class Weight(NamedTuple):
    """A weight as a rank holds it before the data ranks share it.

    sharded: dims that tp, ep or etp shard. item: bytes of an element as it is gathered. state: bytes of
    optimizer state for an element.
    """

    shape: tuple[int, ...]
    sharded: tuple[int, ...]
    trained: bool
    expert: bool
    item: int
    own_layer: bool
    state: int


class Size(NamedTuple):
    """Elements of some weights, and of the trained ones among them."""

    every: int
    trained: int


@dataclass(frozen=True)
class Unit:
    """Weights of a stage that FSDP gathers at once, of which this rank has a part by tp, ep and etp.

    whole: before the data ranks share it. shard: of one data rank, padded. shards, replicas: data ranks.
    item: bytes of an element as it is gathered. own_layer: gathered and freed within a forward. state: bytes
    of optimizer state of a shard.
    """

    whole: Size
    shard: Size
    shards: int
    replicas: int
    item: int
    own_layer: bool
    state: int

    @property
    def gathered(self) -> int:
        """Bytes of the gathered weights."""
        return self.shard.every * self.shards * self.item


class Items(NamedTuple):
    """Bytes of an element: as weights are gathered, and as they and sums of gradients are stored; what
    updates them, and whether an average of them is kept."""

    gathered: int
    stored: int
    rule: AdamW | Muon
    averaged: bool = False


def stage_weights(module: nn.Module, layout: Layout, item: Items, *, by_layer: bool) -> list[list[Weight]]:
    """The weights of a stage by unit, as sharding.shard_module makes units.

    module: the whole stage, on the meta device. by_layer: each layer is a unit.
    """
    roots: list[tuple[nn.Module, bool, int]] = []  # (module, whether of experts, bytes of an element)
    if item.gathered != item.stored and isinstance(module, LLM):
        roots += [(sub, False, item.stored) for sub in precise_modules(module)]
    if max(layout.tp, layout.ep, layout.etp) > 1:
        subs = (sub for sub in module.modules() for s in own_specs(sub).values() if s.view == "expert")
        roots += [(sub, True, item.gathered) for sub in dict.fromkeys(subs)]
    roots += [(sub, False, item.gathered) for sub in (*(layers_of(module) if by_layer else ()), module)]
    taken: set[int] = set()
    units = []
    for root, expert, size in roots:
        found = []
        for _, param, spec in declared(root):
            if id(param) not in taken and param.ndim:
                taken.add(id(param))
                part = _local(tuple(param.shape), spec, layout)
                own_layer = by_layer and root is not module
                state = state_bytes(item.rule, spec, param.ndim, item.stored) + item.averaged * item.stored
                found.append(
                    Weight(*part, param.requires_grad, expert, item=size, own_layer=own_layer, state=state)
                )
        units += [found] if found else []
    return units


def _local(
    shape: tuple[int, ...], spec: ParamSpec, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of a rank's part, its dims that are sharded) by tp, or by ep and etp."""
    wanted = {"tp": spec.shard_dim} if spec.view == "dense" else {"ep": spec.shard_dim, "etp": spec.etp_dim}
    sizes = {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp}
    over = {dim: sizes[axis] for axis, dim in wanted.items() if dim is not None and sizes[axis] > 1}
    return tuple(n // over.get(k, 1) for k, n in enumerate(shape)), tuple(over)


def units_of(stage: Iterable[Sequence[Weight]], layout: Layout, shards: Shards) -> list[Unit]:
    """The units of a stage (stage_weights), in the order in which FSDP takes their weights."""
    out = []
    for weights in stage:
        first = weights[0]
        n = shards.expert if first.expert else shards.dense
        ranks = layout.edp if first.expert else layout.dp * layout.cp
        pairs = [(math.prod(w.shape), _shard(w, n)) for w in weights]
        learns = [w.trained for w in weights]
        whole, shard = (
            Size(sum(column), sum(itertools.compress(column, learns))) for column in zip(*pairs, strict=True)
        )
        state = sum(size * w.state for (_, size), w in zip(pairs, weights, strict=True) if w.trained)
        out.append(Unit(whole, shard, n, ranks // n, item=first.item, own_layer=first.own_layer, state=state))
    return out


def _shard(weight: Weight, shards: int) -> int:
    """Elements of the first of the shards of a weight."""
    dim = data_dim(weight.shape, weight.sharded, shards)
    return math.prod(weight.shape) // max(weight.shape[dim], 1) * -(-weight.shape[dim] // shards)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a module that FSDP can gather and free one at a time."""
    assert isinstance(module, LLM | EncoderModule)
    mtp_layers = module.mtp.layers if isinstance(module, LLM) and module.mtp is not None else ()
    return [*module.layers, *mtp_layers]


def default_policy(stages: Sequence[Sequence[Sequence[Weight]]], pp: int, stored: int, most: int) -> Policy:
    """The policy, in a step of several micro-batches, of a module that names none.

    step, unless whole weights and gradients take more than `most` bytes on a rank; else zero3.
    stages: stage_weights() of each. stored: bytes of an element of a gradient.
    """
    held = [0] * pp
    for s, units in enumerate(stages):
        held[s % pp] += sum(math.prod(w.shape) * (w.item + w.trained * stored) for u in units for w in u)
    return "step" if max(held) <= most else "zero3"
