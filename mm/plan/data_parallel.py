"""What each data-parallel policy costs a module: bytes that a rank holds and moves.

docs/layouts.md has the table of policies. Sizes are those of FSDP's own buffers: a dim that the data ranks do
not divide is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm.plan.blueprint import Blueprint
from mm.plan.weights import Unit, units_of
from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action, Kind
from parallel.schedule.plan import parameter_groups
from parallel.topology.data_parallel import POLICIES, Holding, Policy, shards_of
from parallel.topology.layout import Unfit


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
    """By policy, what it costs the rank of a module that holds most; as stage_costs()."""
    found = [stage_costs(blueprint, name, pp) for pp in range(blueprint.layouts[name].pp)]
    return {policy: max((costs[policy] for costs in found), key=lambda c: c.step) for policy in found[0]}


def stage_costs(blueprint: Blueprint, name: str, pp: int) -> dict[Policy, PolicyCost]:
    """By policy, what it costs a module's pipeline rank `pp`, on the data rank with the largest shards.

    Every step is taken to have items of all encoders in each micro-batch. Without hsdp where nodes do not
    allow it.
    """
    layout, cfg = blueprint.layouts[name], blueprint.cfg
    schedule = blueprint.schedule([set(cfg.model)] * cfg.schedule.microbatches)
    actions = [a for a in schedule.actions(layout.rank_at(pp=pp)) if a.module == name]
    stages = range(pp, len(blueprint.stages[name]), layout.pp)
    out = {}
    for policy in POLICIES:
        try:
            shards = shards_of(layout, policy, blueprint.node_size)
        except Unfit:
            continue
        units = {s: units_of(blueprint.weights(name, s), layout, shards) for s in stages}
        # Where each weight is on one rank only, all policies are one.
        holding = POLICIES[policy if parameter_groups(name, blueprint.uses[name]) else "zero3"]
        out[policy] = cost(units, holding, actions, blueprint.stored_dtype.itemsize)
    return out


def cost(
    units: Mapping[int, Sequence[Unit]], holding: Holding, actions: Sequence[Action], stored: int
) -> PolicyCost:
    """What a policy costs a rank.

    units: by stage. actions: the rank's, of this module. stored: bytes of an element of weights as the
    optimizer has them, and of gradients' sums.
    """
    flat = [u for own in units.values() for u in own]
    fixed = sum(u.shard.every * stored + u.state for u in flat)
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
