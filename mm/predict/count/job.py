"""A step of a job as its busiest data rank has it: Counts, from the blueprint and the step's plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm.config.outline import SINK
from mm.config.training import recomputed
from mm.plan.blueprint import Blueprint
from mm.plan.data_parallel import cost
from mm.plan.projectors import projector_kind
from mm.plan.step_plan import Edge, StepPlan
from mm.plan.trained import trained_below
from mm.predict.count.load import item_load, rows_entering, token_load, widest
from mm.predict.count.pieces import How, Piece, chain
from mm.predict.count.sizes import Degrees
from mm.predict.count.stage import Frozen, Outer, encoder_parts, llm_parts
from mm.predict.count.tape import Low
from mm.predict.count.weights import gather_messages, owned, sum_messages
from mm.predict.work import Counts, Held, Kernel, Message, Work
from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    Kind,
)
from parallel.topology.data_parallel import POLICIES
from parallel.topology.layout import Coord


def count_job(blueprint: Blueprint, plan: StepPlan) -> Counts:
    """Count a step. O(stages x micro-batches) in look-ups; equal layers and loads are counted once.

    `work` is that of the micro-batch with the median load among those with work; `load` relates the others
    to it, by FLOPs.
    """
    work: dict[tuple[str, int, Kind], Work] = {}
    load: dict[tuple[str, int], float] = {}
    kept, hidden = {}, {}
    moved: dict[tuple[str, int, Kind], tuple[Message, ...]] = {}
    held: dict[tuple[str, int], Held] = {}
    schedule = blueprint.schedule(plan.active)
    for m in blueprint.modules:
        found = module_pieces(blueprint, plan, m)
        load |= {(m, k): x for k, x in enumerate(found.load)}
        layout = blueprint.layouts[m]
        for s, part in enumerate(found.stages):
            work[m, s, FORWARD] = part.forward
            work[m, s, BACKWARD] = part.backward
            work[m, s, BACKWARD_INPUT] = part.backward_input
            work[m, s, BACKWARD_WEIGHT] = part.backward_weight
            kept[m, s], hidden[m, s] = part.kept, part.out
        for pp in range(layout.pp):
            actions = [a for a in schedule.actions(layout.rank_at(pp=pp)) if a.module == m]
            own = [s for s in range(pp, len(found.stages), layout.pp)]
            moved |= _moved(blueprint, m, own, actions)
            held[m, pp] = _held(blueprint, m, own, actions, found.stages)
            for s in own:
                work[m, s, Kind.OPTIMIZER] = _update(blueprint, m, s)
    rows = {(e.source, e.stage): _rows(blueprint, plan, e) for e in blueprint.edges}
    return Counts(work, moved, load=load, kept=kept, hidden=hidden, rows=rows, held=held)


class ModulePieces(NamedTuple):
    """A module's stages in the micro-batch of median load, and by micro-batch the factor on it."""

    stages: tuple[Piece, ...]
    load: tuple[float, ...]


def module_pieces(blueprint: Blueprint, plan: StepPlan, module: str) -> ModulePieces:
    """The stages of a module as its busiest dp rank computes them."""
    dp = _busiest(blueprint, plan, module)
    at, n = Coord(0, 0, dp, 0), len(plan.microbatches)
    every = range(len(blueprint.stages[module]))
    flops = np.asarray(
        [
            sum(p.forward.flops for s in every for p in parts_of(blueprint, plan, (module, s), k, at))
            for k in range(n)
        ]
    )
    some = np.flatnonzero(flops > 0)
    if not len(some):
        return ModulePieces(stages_of(blueprint, plan, module, 0, at) if n else (), (0.0,) * n)
    median = int(some[np.argsort(flops[some], kind="stable")[len(some) // 2]])
    return ModulePieces(
        stages_of(blueprint, plan, module, median, at), tuple((flops / flops[median]).tolist())
    )


def _busiest(blueprint: Blueprint, plan: StepPlan, module: str) -> int:
    dp = blueprint.layouts[module].dp
    if module == SINK:
        total = np.bincount(plan.seats.dp, weights=plan.llm_cost, minlength=dp)
    else:
        items = plan.items[module]
        total = np.bincount(items.columns.source_dp, weights=items.cost, minlength=dp)
    return int(np.argmax(total))


def how_of(blueprint: Blueprint, module: str, *, halves: bool = False, host: bool = False) -> How:
    """How a module computes. halves, host: of How."""
    parts = recomputed(blueprint.cfg.train, module)
    if module != SINK:
        parts = parts & {"full"}
    return How(
        item=blueprint.dtype.itemsize,
        recompute=parts,
        halves=halves,
        trains=module not in blueprint.frozen and module not in blueprint.cfg.train.lora,
        below=True,
        low=low_of(blueprint, module),
        host=host,
    )


def low_of(blueprint: Blueprint, module: str) -> Low | None:
    """The adapters of a module that are trained."""
    given = blueprint.cfg.train.lora.get(module)
    if given is None or module in blueprint.frozen:
        return None
    return Low(given.rank, tuple(given.targets))


def stages_of(blueprint: Blueprint, plan: StepPlan, module: str, k: int, at: Coord) -> tuple[Piece, ...]:
    """The stages of a module in micro-batch k on the rank at a place, whatever its pipeline rank."""
    every = range(len(blueprint.stages[module]))
    return tuple(chain(parts_of(blueprint, plan, (module, s), k, at)) for s in every)


def parts_of(
    blueprint: Blueprint,
    plan: StepPlan,
    part: tuple[str, int],
    k: int,
    at: Coord,
    *,
    how: How | None = None,
    ep_rank: int | None = None,
) -> Sequence[Piece]:
    """The parts of a stage of a module in micro-batch k on the rank at a place, one after another. part:
    (module, stage). how: how_of() the module by default. ep_rank: of Degrees."""
    (module, s), mb = part, plan.microbatches[k]
    layout, stage = blueprint.layouts[module], blueprint.stages[module][s]
    degrees = Degrees.of(module, layout, at.tp, at.cp, ep_rank)
    how = how_of(blueprint, module) if how is None else how
    if module == SINK:
        load = token_load(mb, at, blueprint.llm, blueprint.dtype.itemsize)
        if "E" in blueprint.llm.kinds and blueprint.llm.dispatcher == "all_gather" and layout.ep > 1:
            load = load._replace(widest=widest(mb, layout, at))
        entering = tuple(
            rows_entering(mb, e.source, layout, at)
            for e in blueprint.edges
            if e.stage == s and mb.edges[e.source].count
        )
        if s == 0 and not how.trains:
            rows = [e.source not in blueprint.frozen for e in blueprint.edges if e.stage == 0]
            how = how._replace(below=any(rows) and bool(entering))
        return llm_parts(blueprint.llm, stage, degrees, load, how, entering)
    use, enc = blueprint.inputs.encoders[module], blueprint.cfg.model[module]
    items = item_load(mb, module, use, at)
    if items is None:
        return []
    frozen = Frozen(enc.freeze_layers, enc.freeze in ("encoder", "all"), enc.freeze in ("projector", "all"))
    outer = Outer(enc.projector.hidden, blueprint.llm.d_model, projector_kind(enc.projector))
    how = how._replace(below=s > 0 and trained_below(blueprint, module, s))
    return encoder_parts(use, stage, degrees, items, how, frozen=frozen, outer=outer)


def _moved(
    blueprint: Blueprint, module: str, stages: Sequence[int], actions: Sequence[Action]
) -> dict[tuple[str, int, Kind], tuple[Message, ...]]:
    holding, stored = POLICIES[blueprint.policies[module]], blueprint.stored_dtype.itemsize
    out = {}
    for s in stages:
        units = owned(blueprint, module, s)
        own = [a for a in actions if a.stage == s]
        out[module, s, Kind.GATHER] = gather_messages(units, module, holding, own)
        out[module, s, Kind.GRAD_SYNC] = sum_messages(units, module, holding, own, stored)
    return out


def _held(
    blueprint: Blueprint,
    module: str,
    stages: Sequence[int],
    actions: Sequence[Action],
    found: Sequence[Piece],
) -> Held:
    stored = blueprint.stored_dtype.itemsize
    units = {s: owned(blueprint, module, s) for s in stages}
    flat = [o.unit for own in units.values() for o in own]
    parameters = sum(u.shard.every for u in flat) * stored
    optimizer = sum(u.state for u in flat)
    holding = POLICIES[blueprint.policies[module]]
    whole = cost({s: [o.unit for o in own] for s, own in units.items()}, holding, actions, stored)
    gathered = sum(u.gathered for u in flat if holding.params != "each" or not u.own_layer)
    learns = any(a.kind in (BACKWARD, BACKWARD_WEIGHT) for a in actions)
    gradients = max(0, whole.peak - parameters - optimizer - gathered) if learns else 0
    temporary = max((_beyond(found[s], learns) for s in stages), default=0.0)
    return Held(parameters, optimizer, gathered, gradients, temporary)


def _beyond(part: Piece, learns: bool) -> float:
    """The most that a stage needs beside what it keeps."""
    most = part.in_forward.total - part.kept
    return max(0.0, most, part.in_backward.total - part.kept if learns else 0.0)


def _update(blueprint: Blueprint, module: str, stage: int) -> Work:
    """The update of a stage's weights: each element of weights, gradients and state is read, all but
    gradients are written."""
    stored = blueprint.stored_dtype.itemsize
    units = [o.unit for o in owned(blueprint, module, stage)]
    size = sum(3 * u.shard.trained * stored + 2 * u.state for u in units)
    return Work((Kernel("memory", (), "", 0.0, float(size)),)) if size else Work()


def _rows(blueprint: Blueprint, plan: StepPlan, edge: Edge) -> float:
    """Bytes of an edge's rows on the rank that reads most of them in a micro-batch."""
    layout, most = blueprint.layouts[SINK], 0
    for mb in plan.microbatches:
        if mb.edges[edge.source].count:
            for dp in range(min(layout.dp, 8)):
                most = max(most, rows_entering(mb, edge.source, layout, Coord(0, 0, dp, 0)))
    width = int(np.prod(blueprint.entry_shape(edge)))
    return float(most * width * blueprint.dtype.itemsize)
