"""A rank's part of a step: its actions, what each computes, and what it sends between them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from encoders.module import needed_items
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import Edge, StepPlan
from mm.predict.count.job import how_of, parts_of
from mm.predict.count.load import axes_of, metas_on, once, rows_entering, token_load
from mm.predict.count.pieces import Piece, chain
from mm.predict.count.sizes import TokenLoad
from mm.predict.count.update import update_messages
from mm.predict.count.weights import Owned, gather_messages, owned, sum_messages
from mm.predict.work import Message, Work
from mm.ranks.job import assembler_of
from mm.ranks.launch import RankInfo
from parallel.boundary.plan import EdgePlan, Transfer
from parallel.comm.transport import Messages
from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOUNDARY,
    COMPUTE,
    FORWARD,
    RECEIVES,
    SENDS,
    Action,
    Kind,
)
from parallel.schedule.plan import SchedulePlan
from parallel.sequence.intervals import count
from parallel.topology.data_parallel import POLICIES
from parallel.topology.groups import Group
from parallel.topology.layout import Coord


class Sent(NamedTuple):
    """Calls of one kind: the operation and the global ranks of its group; of a message both ends."""

    op: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class RankPlan:
    """A rank's part of a step, and what its computations are. pieces: of all ranks of the step that are
    given the same, by module, stage, micro-batch, place but for pp, and whether backwards have halves.
    relays: whether rows may come in two hops; how many come to a rank does not depend on it. rounds: whether
    rows of experts are as many as this rank has of an even choice, or the mean of its ep group. host: whether
    ranks are a machine's cores, over gloo."""

    blueprint: Blueprint
    plan: StepPlan
    rank: int
    relays: bool = True
    rounds: bool = True
    host: bool = False
    pieces: dict[Hashable, Piece] = field(default_factory=dict)
    _places: dict[str, Coord] = field(default_factory=dict)

    @cached_property
    def schedule(self) -> SchedulePlan:
        """Of all ranks."""
        return self.blueprint.schedule(self.plan.active)

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """Of this rank, in order."""
        return self.schedule.actions(self.rank)

    @cached_property
    def modules(self) -> list[str]:
        """Modules on this rank."""
        return [m for m in self.blueprint.modules if self.rank in self.blueprint.layouts[m].ranks]

    def stages(self, module: str) -> range:
        """Stages of a module here."""
        layout = self.blueprint.layouts[module]
        return range(layout.coord(self.rank).pp, len(self.blueprint.stages[module]), layout.pp)

    @cached_property
    def halves(self) -> frozenset[str]:
        """Modules whose backwards have two halves."""
        return frozenset(a.module for a in self.actions if a.kind is BACKWARD_WEIGHT)

    def piece(self, a: Action) -> Piece:
        """The stage of a computation, in what it covers."""
        parts = []
        for i in a.microbatches:
            if a.module != SINK and a.module not in self.plan.active[i]:
                continue
            parts.append(self._piece(a.module, a.stage, i))
        return parts[0] if len(parts) == 1 else chain(parts)

    def _piece(self, module: str, stage: int, i: int) -> Piece:
        at, halves = self.at(module), module in self.halves
        layout = self.blueprint.layouts[module]
        ep_rank = layout.expert_coord(self.rank).ep if layout.ep > 1 and self.rounds else None
        key = module, stage, i, at[:3], ep_rank, halves
        if key not in self.pieces:
            how = how_of(self.blueprint, module, halves=halves, host=self.host)
            parts = parts_of(self.blueprint, self.plan, (module, stage), i, at, how=how, ep_rank=ep_rank)
            self.pieces[key] = chain(parts)
        return self.pieces[key]

    def at(self, module: str) -> Coord:
        """The place of this rank in a module."""
        if module not in self._places:
            self._places[module] = self.blueprint.layouts[module].coord(self.rank)
        return self._places[module]

    def entering(self, edge: Edge, i: int) -> float:
        """Bytes of an edge's rows that enter the language model here in a micro-batch."""
        layout = self.blueprint.layouts[SINK]
        rows = rows_entering(self.plan.microbatches[i], edge.source, layout, self.at(SINK))
        shape = self.blueprint.entry_shape(edge)
        return float(rows * math.prod(shape) * self.blueprint.dtype.itemsize)

    def tokens(self, i: int) -> TokenLoad:
        """What the language model here is given in a micro-batch."""
        at, blueprint = self.at(SINK), self.blueprint
        return token_load(self.plan.microbatches[i], at, blueprint.llm, blueprint.dtype.itemsize)

    def indices(self, i: int) -> float:
        """Bytes of what all layers of the language model here use of a packing: made once a micro-batch."""
        load, cfg = self.tokens(i), self.blueprint.llm
        kinds = {cfg.symbols[k] for s in self.stages(SINK) for k in self.blueprint.stages[SINK][s].layers}
        size = 0.0
        if "*" in kinds:
            layers = [k for s in self.stages(SINK) for k in self.blueprint.stages[SINK][s].layers]
            windows = {cfg.window_of(k) is not None for k in layers if cfg.symbols[k] == "*"}
            size += load.attended.indices * (False in windows)
            if True in windows and load.windowed is not None:
                size += load.windowed.attended.indices
        size += 8.0 * load.tokens * ("M" in kinds or bool(cfg.aux_weight and "E" in kinds))
        return size + 8.0 * load.tokens * ("*" in kinds and cfg.rope_theta is not None)

    def metas(self, module: str, i: int) -> list[Any]:
        """Of the items that this rank reads of a micro-batch."""
        use, mb = self.blueprint.inputs.encoders[module], self.plan.microbatches[i]
        at = self.at(module)
        mine = metas_on(mb, module, at.dp)
        return [mine[k] for k in needed_items(use.cls, use.cfg, mine, axes_of(use.layout, at))]

    def learns(self, module: str, microbatch: int) -> bool:
        """Whether a backward of a micro-batch follows."""
        return self.schedule.learns(module, microbatch)

    def work(self, a: Action) -> Work:
        """What a computation does."""
        if a.kind not in COMPUTE:
            return Work()
        part = self.piece(a)
        of = {
            FORWARD: part.forward,
            BACKWARD: part.backward,
            BACKWARD_INPUT: part.backward_input,
            BACKWARD_WEIGHT: part.backward_weight,
        }
        return of[a.kind]

    def members(self, group: Group) -> tuple[int, ...]:
        """The ranks of a group of this rank."""
        return next(r for r in self.blueprint.groups.named[group] if self.rank in r)

    @cached_property
    def units(self) -> dict[tuple[str, int], list[Owned]]:
        """By module and stage here, what FSDP gathers at once."""
        out = {}
        for m in self.modules:
            for s in self.stages(m):
                out[m, s] = owned(self.blueprint, m, s)
        return out

    def over_data(self) -> list[Message]:
        """Messages of weights and gradients, and those of the update."""
        out: list[Message] = []
        stored = self.blueprint.stored_dtype.itemsize
        for (m, s), units in self.units.items():
            holding = POLICIES[self.blueprint.policies[m]]
            kinds = (*COMPUTE, Kind.GRAD_SYNC)
            own = [a for a in self.actions if (a.module, a.stage) == (m, s) and a.kind in kinds]
            out += gather_messages(units, m, holding, own)
            out += sum_messages(units, m, holding, own, stored)
        return [*out, *update_messages(self.blueprint, self.rank)]

    def between(self, a: Action) -> list[tuple[Sent, float]]:
        """The messages of sends, receives and boundaries."""
        if a.kind in SENDS or a.kind in RECEIVES:
            return [self._pipe(a)]
        return self._edge(a) if a.kind in BOUNDARY else []

    def _pipe(self, a: Action) -> tuple[Sent, float]:
        layout, peer = self.blueprint.layouts[a.module], a.peer
        assert peer is not None
        at = layout.coord(self.rank)
        other = layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=peer % layout.pp)
        sends = a.kind in SENDS
        pair = (self.rank, other) if sends else (other, self.rank)
        return Sent("send" if sends else "recv", pair), self.hidden(a.module, min(a.stage, peer), a)

    def hidden(self, module: str, stage: int, a: Action) -> float:
        """Bytes of the hidden states that leave a stage."""
        each = [i for i in a.microbatches if module == SINK or module in self.plan.active[i]]
        return sum(self._piece(module, stage, i).out for i in each)

    @cached_property
    def _boundaries(self) -> list[Mapping[Edge, EdgePlan]]:
        nodes = self.blueprint.node_size if self.relays else None
        info = RankInfo(self.rank, self.blueprint.world, torch.device("cpu"), node_size=nodes)
        assembler = assembler_of(self.blueprint, info, {})
        key = "boundary", self.rank, info.node_size, tuple(assembler.row_shapes.items())
        return once(self.plan, key, lambda: [b.edges for b in assembler.boundary(self.plan)])

    def edge_plan(self, a: Action) -> EdgePlan:
        """This rank's part of an edge in a micro-batch."""
        return self._boundaries[a.microbatch][Edge(a.module, a.stage)]

    def row_bytes(self, a: Action) -> int:
        """Bytes of a row of an edge."""
        shape = self.blueprint.entry_shape(Edge(a.module, a.stage))
        return math.prod(shape) * self.blueprint.dtype.itemsize

    def _edge(self, a: Action) -> list[tuple[Sent, float]]:
        plan, row = self.edge_plan(a), self.row_bytes(a)
        forward = a.kind is Kind.BOUNDARY_FORWARD
        transfers: Sequence[Transfer] = (plan.forward,) if forward else plan.backward
        group = Group("edge", a.module, "", "forward" if forward else "backward", a.stage)
        out = []
        for t in transfers:
            if t.moves:
                hops = [(t.sends, t.recvs)]
                hops += [] if t.relay is None else [(t.relay.sends, t.relay.recvs)]
                for gone, come in hops:
                    size = max(_rows(gone), _rows(come)) * row
                    out.append((Sent("all_to_all", self.members(group)), float(size)))
        return out


def _rows(messages: Messages) -> int:
    return sum(count(m.rows) for m in messages)
