"""What each data-parallel policy costs a module: bytes that a rank holds and moves, and the default by size.

docs/layouts.md has the table of policies. Sizes are those of FSDP's own buffers: a dim that the data ranks do
not divide is padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action, Kind
from parallel.topology.axis import Axes
from parallel.topology.data_parallel import POLICIES, Holding, Policy, Shards, shards_of
from parallel.topology.layout import Layout, Unfit

if TYPE_CHECKING:
    from torch import nn

    from mm.plan.blueprint import Blueprint
    from parallel.sharding.param import ParamSpec

# Whole weights and gradients of a module on a rank, in bytes, up to which the default policy keeps them for a
# step: a twentieth of a device with 80 GB.
MOST_HELD = 4 * 2**30


class Size(NamedTuple):
    """Elements of some weights, and of the trained ones among them."""

    every: int
    trained: int


@dataclass(frozen=True)
class Unit:
    """Weights of a stage that FSDP gathers at once, of which this rank has a part by tp, ep and etp.

    whole: before the data ranks share it. shard: of one data rank, padded. shards, replicas: data ranks.
    item: bytes of an element as it is gathered. own_layer: gathered and freed within a forward.
    """

    whole: Size
    shard: Size
    shards: int
    replicas: int
    item: int
    own_layer: bool

    @property
    def gathered(self) -> int:
        """Bytes of the gathered weights."""
        return self.shard.every * self.shards * self.item


@dataclass(frozen=True)
class Moved:
    """Messages of one step on a rank, and the bytes of whole weights or gradients that they span.

    gathers, scatters, sums: how many all-gathers, reduce-scatters and all-reduces. Of the bytes of the first
    two, each of n ranks receives (n - 1) / n, of the last twice as much.
    """

    gathers: int = 0
    gather_bytes: int = 0
    scatters: int = 0
    scatter_bytes: int = 0
    sums: int = 0
    sum_bytes: int = 0

    def __add__(self, other: Moved) -> Moved:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Moved(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class PolicyCost:
    """What a policy costs a rank of a module.

    Bytes of weights, gradients and optimizer state. rest: between steps. step: the most between computations
    of a step. peak: in a backward, with what is whole in it only; FSDP's messages of one unit come on top.
    """

    rest: int
    step: int
    peak: int
    moved: Moved


def policy_costs(blueprint: Blueprint, name: str) -> dict[Policy, PolicyCost]:
    """By policy, what it costs the rank of a module that holds most.

    Every step is taken to have items of all encoders in each micro-batch. Without hsdp where nodes do not
    allow it.
    """
    layout, cfg = blueprint.layouts[name], blueprint.cfg
    schedule = blueprint.schedule([set(cfg.model)] * cfg.schedule.microbatches)
    out = {}
    for policy in POLICIES:
        try:
            shards = shards_of(layout, policy, blueprint.node_size)
        except Unfit:
            continue
        found = []
        for pp in range(layout.pp):
            actions = [a for a in schedule.actions(layout.rank_at(pp=pp)) if a.module == name]
            units = {
                s: units_of(blueprint, name, s, shards)
                for s in range(pp, len(blueprint.stages[name]), layout.pp)
            }
            found.append(cost(units, policy, actions, blueprint.stored_dtype.itemsize))
        out[policy] = max(found, key=lambda c: c.step)
    return out


def default_policy(blueprint: Blueprint, name: str) -> Policy:
    """The policy of a module that names none.

    zero3 where a step has one micro-batch, whose weights have to be gathered anyway; else step, unless whole
    weights and gradients take more than MOST_HELD on a rank.
    """
    if blueprint.cfg.schedule.microbatches == 1:
        return "zero3"
    pp, stored = blueprint.layouts[name].pp, blueprint.stored_dtype.itemsize
    held = [0] * pp
    for s in range(len(blueprint.stages[name])):
        for u in units_of(blueprint, name, s, Shards(1, 1)):
            held[s % pp] += u.whole.every * u.item + u.whole.trained * stored
    return "step" if max(held) <= MOST_HELD else "zero3"


class Weight(NamedTuple):
    """A weight as a rank holds it before the data ranks share it.

    sharded: dims that tp, ep or etp shard. item: bytes of an element as it is gathered.
    """

    shape: tuple[int, ...]
    sharded: tuple[int, ...]
    trained: bool
    expert: bool
    item: int
    own_layer: bool


def units_of(blueprint: Blueprint, name: str, stage: int, shards: Shards) -> list[Unit]:
    """The units of a stage, in the order in which FSDP takes their weights."""
    layout, out = blueprint.layouts[name], []
    for weights in _weights(blueprint, name, stage):
        expert = weights[0].expert
        n = shards.expert if expert else shards.dense
        ranks = layout.edp if expert else layout.dp * layout.cp
        pairs = [(math.prod(w.shape), _shard(w, n)) for w in weights]
        learns = [w.trained for w in weights]
        whole, shard = (
            Size(sum(column), sum(itertools.compress(column, learns))) for column in zip(*pairs, strict=True)
        )
        first = weights[0]
        out.append(Unit(whole, shard, n, ranks // n, item=first.item, own_layer=first.own_layer))
    return out


def _shard(weight: Weight, shards: int) -> int:
    """Elements of the first of the shards of a weight."""
    from parallel.sharding.shard import data_dim

    dim = data_dim(weight.shape, weight.sharded, shards)
    return math.prod(weight.shape) // max(weight.shape[dim], 1) * -(-weight.shape[dim] // shards)


def _weights(blueprint: Blueprint, name: str, stage: int) -> list[list[Weight]]:
    """The weights of a stage by unit, as sharding.shard_module makes units; found once."""
    from llm.model import LLM, precise_modules
    from mm.plan.blueprint import bare_module
    from parallel.sharding.param import declared, own_specs

    if (name, stage) in blueprint.weights:
        return blueprint.weights[name, stage]
    layout, stored, item = blueprint.layouts[name], blueprint.stored_dtype.itemsize, blueprint.dtype.itemsize
    module = bare_module(blueprint, name, Axes(), blueprint.stages[name][stage])
    by_layer = blueprint.cfg.train.shard == "layer"
    roots: list[tuple[nn.Module, bool, int]] = []  # (module, whether of experts, bytes of an element)
    if item != stored and isinstance(module, LLM):
        roots += [(sub, False, stored) for sub in precise_modules(module)]
    if max(layout.tp, layout.ep, layout.etp) > 1:
        subs = (sub for sub in module.modules() for s in own_specs(sub).values() if s.view == "expert")
        roots += [(sub, True, item) for sub in dict.fromkeys(subs)]
    roots += [(sub, False, item) for sub in (*(layers_of(module) if by_layer else ()), module)]
    taken: set[int] = set()
    units = []
    for root, expert, size in roots:
        found = []
        for _, param, spec in declared(root):
            if id(param) not in taken and param.ndim:
                taken.add(id(param))
                shape, sharded = _local(tuple(param.shape), spec, layout)
                own_layer = by_layer and root is not module
                found.append(
                    Weight(shape, sharded, param.requires_grad, expert, item=size, own_layer=own_layer)
                )
        units += [found] if found else []
    blueprint.weights[name, stage] = units
    return units


def _local(
    shape: tuple[int, ...], spec: ParamSpec, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of a rank's part, its dims that are sharded) by tp, or by ep and etp."""
    wanted = {"tp": spec.shard_dim} if spec.view == "dense" else {"ep": spec.shard_dim, "etp": spec.etp_dim}
    sizes = {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp}
    over = {dim: sizes[axis] for axis, dim in wanted.items() if dim is not None and sizes[axis] > 1}
    return tuple(n // over.get(k, 1) for k, n in enumerate(shape)), tuple(over)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a module that FSDP can gather and free one at a time."""
    from encoders.module import EncoderModule
    from llm.model import LLM

    assert isinstance(module, LLM | EncoderModule)
    mtp_layers = module.mtp.layers if isinstance(module, LLM) and module.mtp is not None else ()
    return [*module.layers, *mtp_layers]


def cost(
    units: Mapping[int, Sequence[Unit]], policy: Policy, actions: Sequence[Action], stored: int
) -> PolicyCost:
    """What a policy costs a rank.

    units: by stage. actions: the rank's, of this module. stored: bytes of an element of weights as the
    optimizer has them, and of gradients' sums.
    """
    holding, flat = POLICIES[policy], [u for own in units.values() for u in own]
    fixed = sum(u.shard.every + 2 * u.shard.trained for u in flat) * stored
    # FSDP frees after a backward. Without one, as in a frozen encoder, weights stay as a forward leaves them.
    stay = holding.params == "each" and not any(a.kind in (BACKWARD, BACKWARD_INPUT) for a in actions)
    whole = sum(u.gathered for u in flat if holding.params == "replicated" or (stay and not u.own_layer))
    step, peak = _most_held(units, holding, actions, stored)
    moved = (_moved(units[s], holding, [a for a in actions if a.stage == s], stored) for s in units)
    return PolicyCost(fixed + whole, fixed + step, fixed + peak, sum(moved, start=Moved()))


def _most_held(
    units: Mapping[int, Sequence[Unit]], holding: Holding, actions: Sequence[Action], stored: int
) -> tuple[int, int]:
    """The most bytes of whole weights and of gradients between the actions of a step, and in one of them."""
    weights, gradients = dict.fromkeys(units, 0), dict.fromkeys(units, 0)
    late = {a.stage for a in actions if a.kind is Kind.GRAD_SYNC}
    if holding.params == "replicated":
        weights = {s: sum(u.gathered for u in own) for s, own in units.items()}
    step = peak = sum(weights.values())
    for a in actions:
        if a.stage not in units:
            continue
        own = units[a.stage]
        lasting = [u for u in own if holding.params != "each" or not u.own_layer]
        # Layers that are freed after a forward or a backward are whole in it only, one at a time.
        passing = [u for u in own if u.own_layer]
        shards = sum(u.shard.trained for u in own) * stored
        if a.kind in (FORWARD, BACKWARD, BACKWARD_INPUT, Kind.GATHER):
            weights[a.stage] = sum(u.gathered for u in lasting)
        during = 0 if holding.params != "each" else max((u.gathered for u in passing), default=0)
        if a.kind in (BACKWARD, BACKWARD_WEIGHT):
            if holding.sums == "step":
                gradients[a.stage] = sum(u.whole.trained for u in own) * stored
            else:
                gradients[a.stage] = shards
                during += sum(u.whole.trained * u.item for u in own if not u.own_layer)
                during += max((u.whole.trained * u.item for u in passing), default=0)
        peak = max(peak, sum(weights.values()) + sum(gradients.values()) + during)
        freed = holding.params == "each" and a.kind in (BACKWARD, BACKWARD_INPUT)
        if freed or a.kind is Kind.FREE:
            weights[a.stage] = 0
        if (a.last and a.stage not in late) or a.kind is Kind.GRAD_SYNC:
            gradients[a.stage] = shards
        step = max(step, sum(weights.values()) + sum(gradients.values()))
    return step, peak


def _moved(units: Sequence[Unit], holding: Holding, actions: Sequence[Action], stored: int) -> Moved:
    """What the units of one stage move in a step."""
    backwards = sum(a.kind in (BACKWARD, BACKWARD_WEIGHT) for a in actions)
    out = Moved()
    for u in units:
        learns = bool(u.shard.trained and backwards)
        n = int(bool(actions))
        if holding.params == "each":
            n = gathers(actions, u.own_layer)
        elif holding.params == "replicated":
            n = int(any(v.shard.trained for v in units) and backwards > 0)  # else once a run
        scatters = (backwards if holding.sums == "backward" else 1) if learns else 0
        if u.shards > 1:
            trained = u.shard.trained * u.shards * stored
            out += Moved(n, n * u.gathered, scatters, scatters * trained)
        if u.replicas > 1 and learns:
            out += Moved(sums=1, sum_bytes=u.shard.trained * stored)
    return out


def gathers(actions: Sequence[Action], own_layer: bool) -> int:
    """How often FSDP gathers a unit around the computations of its stage, in order.

    A unit stays whole from a forward to the next backward, for good if there is none, and a layer of its own
    to the end of the forward.
    """
    n, whole = 0, not own_layer and not any(a.kind in (BACKWARD, BACKWARD_INPUT) for a in actions)
    for a in actions:
        if a.kind in (FORWARD, BACKWARD, BACKWARD_INPUT):
            n += not whole
            whole = a.kind is FORWARD and not own_layer
    return n
