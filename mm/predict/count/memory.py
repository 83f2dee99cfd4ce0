"""The most memory that a rank holds in a step, by what for: a walk over its actions in order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mm.config.outline import SINK
from mm.plan.trained import trained_below
from mm.predict.count.load import rows_entering
from mm.predict.count.pieces import Level, Piece
from mm.predict.count.rank_plan import RankPlan
from mm.predict.count.weights import Owned
from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOUNDARY_BACKWARD,
    BOUNDARY_FORWARD,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    ActionKey,
    Kind,
)
from parallel.schedule.checker.graph import releases
from parallel.topology.data_parallel import POLICIES

# As mm.virtual names them.
ACTIVATIONS, TEMPORARY, GRADIENTS, GATHERED = "activations", "temporary", "gradients", "gathered_parameters"
COMMUNICATION, OTHER = "communication", "other"


@dataclass(frozen=True)
class Held:
    """Bytes at the peak of a step. kinds: of what. during: the action."""

    total: float
    kinds: Mapping[str, float]
    during: str


def walk(rank: RankPlan) -> Held:
    """The peak of a rank's step."""
    return _Walk(rank).run()


class _Walk:
    def __init__(self, rank: RankPlan) -> None:
        self.rank, self.blueprint = rank, rank.blueprint
        self.stored = self.blueprint.stored_dtype.itemsize
        self.item = self.blueprint.dtype.itemsize
        # What is held, by what it is: (kind, bytes).
        self.held: dict[tuple[object, ...], tuple[str, float]] = {}
        self.fixed = {"parameters": 0.0, "optimizer": 0.0}
        for units in rank.units.values():
            self.fixed["parameters"] += sum(o.unit.shard.every for o in units) * self.stored
            self.fixed["optimizer"] += sum(o.unit.state for o in units)
        self.best, self.kinds, self.during = 0.0, dict[str, float](), "nothing"
        program = rank.schedule.program_of.get(rank.rank)
        self.released: dict[ActionKey, list[ActionKey]] = (
            {} if program is None else releases(rank.schedule, program)
        )
        self.late = {(a.module, a.stage) for a in rank.actions if a.kind is Kind.GRAD_SYNC}

    def run(self) -> Held:
        """Walk."""
        for key in self.rank.units:
            if POLICIES[self.blueprint.policies[key[0]]].params == "replicated":
                self._whole(key)
        self.fixed[OTHER] = inputs_bytes(self.rank)
        for a in self.rank.actions:
            for sent in self.released.get(a[:4], ()):
                self.held.pop(("sent", sent), None)
            self._act(a)
        for one in [one for one in self.held if one[0] == "reduced"]:
            self.held.pop(one)
        self._look(Level(), "update")
        return Held(self.best, self.kinds, self.during)

    def _act(self, a: Action) -> None:
        handlers: dict[Kind, Callable[[Action], None]] = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            BACKWARD_INPUT: self._backward_input,
            BACKWARD_WEIGHT: self._backward_weight,
            SEND_FORWARD: self._send_forward,
            SEND_BACKWARD: self._send_backward,
            RECV_FORWARD: self._receive_forward,
            RECV_BACKWARD: self._receive_backward,
            BOUNDARY_FORWARD: self._boundary_forward,
            BOUNDARY_BACKWARD: self._boundary_backward,
            Kind.GATHER: lambda a: self._whole((a.module, a.stage)),
            Kind.FREE: lambda a: self._free((a.module, a.stage)),
            Kind.GRAD_SYNC: self._sum_all,
        }
        if a.kind in handlers:
            handlers[a.kind](a)

    # What is held.

    def _put(self, key: tuple[object, ...], kind: str, size: float) -> None:
        if size:
            self.held[key] = kind, size

    def _look(self, now: Level, during: str, more: Mapping[str, float] | None = None) -> None:
        """Compare what is held, and what an action needs beside, with the peak so far."""
        kinds = Counter[str](self.fixed)
        for kind, size in self.held.values():
            kinds[kind] += size  # type: ignore[assignment]
        for kind, size in {
            ACTIVATIONS: now.kept,
            # Gradients in the dtype of computation are gone at the end of their backward.
            TEMPORARY: now.passing + now.gradients,
            **(more or {}),
        }.items():
            kinds[kind] += size  # type: ignore[assignment]
        total = sum(kinds.values())
        if total > self.best:
            self.best, self.kinds, self.during = total, dict(kinds), during

    # Weights and their gradients.

    def _whole(self, key: tuple[str, int]) -> None:
        self._put(("whole", *key), GATHERED, float(sum(o.unit.gathered for o in self.rank.units[key])))

    def _whole_again(self, a: Action) -> None:
        """Gather weights for a backward, where another has freed them: those of the root first, which are
        copied out of the buffer that they come in."""
        key = a.module, a.stage
        if self.blueprint.uses[a.module].params != "each":
            return
        there = ("whole", *key) in self.held
        self._whole(key)
        if not there:
            *inner, root = [o.unit for o in self.rank.units[key]]
            more = {COMMUNICATION: float(root.gathered) if root.shards > 1 else 0.0}
            self._look(Level(), str(a), {**more, GATHERED: -float(sum(u.gathered for u in inner))})

    def _last_gathered(self, key: tuple[str, int]) -> float:
        """Bytes of the last gather of a forward: the root's comes first, then those of its parts."""
        *inner, root = [o.unit for o in self.rank.units[key]]
        last = inner[-1] if inner else root
        return float(last.gathered) if last.shards > 1 else 0.0

    def _free(self, key: tuple[str, int]) -> None:
        self.held.pop(("whole", *key), None)

    def _summed(self, a: Action, *, within: bool) -> None:
        """The end of a backward: gradients are added up, or summed over the data ranks. within: whether those
        of experts have been in it."""
        key = a.module, a.stage
        trained = [k for k, o in enumerate(self.rank.units[key]) if o.unit.whole.trained]
        if not trained:
            return
        early = [*self._early(key), *self._routers(key)] if within else []
        late = [k for k in trained if k not in early]
        if self._sums(a):
            self._sum(key, early, str(a), looks=False)
            self._sum(key, late, str(a))
            return
        for k in (*early, *late):
            self.held.pop(("new", *key, k), None)
            self._put(("gradients", *key, k), GRADIENTS, _wide(self.rank.units[key][k], self.stored))
        self._look(Level(), str(a))

    def _sum_all(self, a: Action) -> None:
        units = self.rank.units[a.module, a.stage]
        self._sum((a.module, a.stage), [k for k, o in enumerate(units) if o.unit.whole.trained], str(a))

    def _sums(self, a: Action) -> bool:
        """Whether a backward sums gradients over the data ranks."""
        key = a.module, a.stage
        return (a.last and key not in self.late) or self.blueprint.uses[a.module].sums != "step"

    def _early(self, key: tuple[str, int]) -> list[int]:
        """Units whose gradients are summed or added up where they come: of experts, which are units of FSDP
        where an axis splits them otherwise than other weights."""
        found = enumerate(zip(self.rank.units[key], self.blueprint.weights(*key), strict=True))
        return [k for k, (o, w) in found if w[0].expert and o.unit.whole.trained]

    def _routers(self, key: tuple[str, int]) -> list[int]:
        """Units of routers: of the stored dtype, and unlike scalars of scans entered by hidden states."""
        found = enumerate(self.blueprint.weights(*key))
        return [
            k
            for k, w in found
            if w[0].trained and not w[0].expert and w[0].item != self.item and len(w[0].shape) > 1
        ]

    def _sum(self, key: tuple[str, int], units: Sequence[int], during: str, *, looks: bool = True) -> None:
        """Sum gradients of units over the data ranks: for each a buffer of all, from which its shard comes.

        FSDP keeps the buffer until the next one, or the step's end. The root comes first of those that no
        hidden state enters.
        """
        each = self.blueprint.uses[key[0]].params == "each"
        last = len(self.rank.units[key]) - 1
        for k in sorted(units, key=lambda k: (k != last, k)):
            unit = self.rank.units[key][k].unit
            shard = float(unit.shard.trained * self.stored)
            whole = shard * unit.shards
            self.held.pop(("reduced", *key), None)
            if ("gradients", *key, k) in self.held:
                self.held.pop(("new", *key, k), None)  # they are added to those first
            if looks:
                self._look(Level(), during, {COMMUNICATION: whole})
            self.held.pop(("gradients", *key, k), None)
            self.held.pop(("new", *key, k), None)
            self._put(("reduced", *key), COMMUNICATION, whole)
            # A sum over one rank copies, by way of a third tensor; gloo sums a copy.
            copies = 1 + (unit.shards == 1) + unit.shards * (self.rank.host and unit.shards > 1)
            if ("shards", *key, k) not in self.held:
                # Shards of weights that stay whole are not the module's, so their gradients count as FSDP's.
                self._put(("shards", *key, k), GRADIENTS if each else COMMUNICATION, shard)
                copies -= 1
            if looks:
                self._look(Level(), during, {COMMUNICATION: copies * shard})

    # Computations.

    def _piece(self, a: Action) -> Piece:
        return self.rank.piece(a)

    def _keeps_output(self, a: Action) -> bool:
        """Whether the output of a stage is held until its backward: it is no loss."""
        return not (a.module == SINK and a.stage + 1 == len(self.blueprint.stages[SINK]))

    def _forward(self, a: Action) -> None:
        key, part = (a.module, a.stage), self._piece(a)
        gathers = ("whole", *key) not in self.held
        if self.blueprint.uses[a.module].params == "each":
            self._whole(key)
        if a.module == SINK:
            self._put(("indices", a.microbatch), ACTIVATIONS, self.rank.indices(a.microbatch))
        learns = any(self.rank.learns(a.module, i) for i in a.microbatches)
        # FSDP keeps what the last gather of a forward brought until its end; GATHER's it frees once copied,
        # and gloo's, which are waited for there.
        last = self._last_gathered(key) if gathers and not self.rank.host else 0.0
        self._look(part.in_forward, str(a), {COMMUNICATION: last})
        if not learns:
            self.held.pop(("hidden", *a[1:4]), None)
            if self._keeps_output(a):
                self._put(("output", *a[1:4]), ACTIVATIONS, part.out)
            return
        out = part.out if self._keeps_output(a) else 0.0
        entered = part.holds_input if ("hidden", *a[1:4]) in self.held else 0.0
        self._put(("kept", *a[1:4]), ACTIVATIONS, part.kept + out - entered)

    def _backward(self, a: Action) -> None:
        key, part = (a.module, a.stage), self._piece(a)
        self._whole_again(a)
        kept = self.held.pop(("kept", *a[1:4]), (ACTIVATIONS, 0.0))[1]
        if self._sums(a):
            # Of earlier backwards; this one frees these weights first after a depth, and at its end again.
            deep = [k for k, o in enumerate(self.rank.units[key]) if o.depths > 1]
            self._sum(key, [k for k in deep if ("gradients", *key, k) in self.held], str(a), looks=False)
        # The output, to the end of the backward; without what entered, where that is held as a message.
        extra = kept - part.kept
        # The gradient that has come is part of the piece, which does not know it for a message.
        come = self.held.pop(("gradient", *a[1:4]), ("", 0.0))[1]
        adds = self._adds(key)
        self._in_backward(a, part, extra, come, adds=adds)
        if not adds:
            self._new(key)
        if self.blueprint.uses[a.module].params == "each":
            self._free(key)  # FSDP frees the weights of a unit, then sums its gradients
        self._summed(a, within=True)
        self._gradients_of_inputs(a)

    def _adds(self, key: tuple[str, int]) -> bool:
        """Whether each gradient is added to an earlier one where it comes, as autograd does in one dtype."""
        trained = [k for k, o in enumerate(self.rank.units[key]) if o.unit.whole.trained]
        return self.item == self.stored and all(("gradients", *key, k) in self.held for k in trained)

    def _new(self, key: tuple[str, int]) -> None:
        """Gradients of a backward, in the dtype of computation."""
        for k, o in enumerate(self.rank.units[key]):
            self._put(("new", *key, k), TEMPORARY, float(o.unit.whole.trained * o.unit.item))

    def _in_backward(self, a: Action, part: Piece, extra: float, come: float, *, adds: bool) -> None:
        """Moments of a backward, in which gradients of experts are summed or added up where they come; adds:
        all gradients."""
        key, early = (a.module, a.stage), self._early((a.module, a.stage))
        units = [self.rank.units[key][k].unit for k in early]
        own, sums = sum(u.whole.trained * u.item for u in units), self._sums(a)
        there = "shards" if sums else "gradients"  # to which gradients are added, where there are any
        fresh = [u for k, u in zip(early, units, strict=True) if (there, *key, k) not in self.held]
        became = float(sum((u.shard if sums else u.whole).trained for u in fresh) * self.stored)
        old = sum(self.held.get(("gradients", *key, k), ("", 0.0))[1] for k in early)
        freed = sum(u.gathered for u in units) * (self.blueprint.uses[a.module].params == "each")
        buffers = float(sum(u.shard.trained * u.shards for u in units) * self.stored * sums)
        moments = part.moments or (part.in_backward,)
        if adds:
            moments = (part.adding, *(now._replace(gradients=now.done) for now in moments))
        for now in moments:
            done, ending = (now.done / own, now.ending / own) if own else (0.0, 0.0)
            # The buffer of the last sum is there until the next one's: a router's, where they are units.
            last = buffers / max(1, len(units)) if done and not ending and not self._routers(key) else 0.0
            before = self.held.get(("reduced", *key), ("", 0.0))[1] if sums and done + ending else 0.0
            more = {COMMUNICATION: come + buffers * ending + last - before, GATHERED: -done * freed}
            more[GRADIENTS] = done * (became - old * sums)
            level = now.plus(kept=extra, passing=-come, gradients=-done * own)
            self._look(level, str(a), more)

    def _backward_input(self, a: Action) -> None:
        part = self._piece(a)
        self._whole_again(a)
        kept = self.held.pop(("kept", *a[1:4]), (ACTIVATIONS, 0.0))[1]
        self.held.pop(("gradient", *a[1:4]), None)
        self._look(part.in_backward.plus(kept=kept - part.kept), str(a))
        self._put(("later", *a[1:4]), ACTIVATIONS, part.later)
        self._gradients_of_inputs(a)

    def _backward_weight(self, a: Action) -> None:
        part = self._piece(a)
        self._look(Level(gradients=part.gradients), str(a))
        self.held.pop(("later", *a[1:4]), None)
        self._new((a.module, a.stage))
        self._summed(a, within=False)

    def _gradients_of_inputs(self, a: Action) -> None:
        """What a backward gives: gradients of hidden states and of rows, in memory of their own."""
        if a.stage > 0 and trained_below(self.blueprint, a.module, a.stage):
            self._put(("given", *a[1:4]), OTHER, self.rank.hidden(a.module, a.stage - 1, a))
        if a.module == SINK:
            for edge in (e for e in self.blueprint.edges if e.stage == a.stage):
                if self.rank.learns(edge.source, a.microbatch):
                    size = self.rank.entering(edge, a.microbatch)
                    self._put(("row gradients", edge.source, a.microbatch, edge.stage), OTHER, size)
        elif a.stage + 1 == len(self.blueprint.stages[a.module]):
            for i in a.microbatches:
                for s in self.blueprint.enters(a.module):
                    self.held.pop(("arriving", a.module, i, s), None)
                    self.held.pop(("sent", (BOUNDARY_BACKWARD, a.module, i, s)), None)

    # Messages.

    def _receive_forward(self, a: Action) -> None:
        self._put(("hidden", *a[1:4]), COMMUNICATION, self.rank.hidden(a.module, a.stage - 1, a))

    def _receive_backward(self, a: Action) -> None:
        self._put(("gradient", *a[1:4]), COMMUNICATION, self.rank.hidden(a.module, a.stage, a))

    def _send_forward(self, a: Action) -> None:
        if not self.rank.learns(a.module, a.microbatch):
            one = self.held.pop(("output", *a[1:4]), None)
            if one is not None:
                self.held["sent", a[:4]] = one

    def _send_backward(self, a: Action) -> None:
        self.held.pop(("hidden", *a[1:4]), None)
        one = self.held.pop(("given", *a[1:4]), None)
        if one is not None:
            self.held["sent", a[:4]] = one

    def _boundary_forward(self, a: Action) -> None:
        plan, row = self.rank.edge_plan(a), self.rank.row_bytes(a)
        if plan.forward.rows_out and plan.forward.view is None:
            self._put(("rows", a.module, a.microbatch, a.stage), COMMUNICATION, plan.forward.rows_out * row)

    def _boundary_backward(self, a: Action) -> None:
        self.held.pop(("rows", a.module, a.microbatch, a.stage), None)
        one = self.held.pop(("row gradients", a.module, a.microbatch, a.stage), None)
        if one is not None:
            self.held["sent", a[:4]] = one
        plan, row = self.rank.edge_plan(a), self.rank.row_bytes(a)
        arriving = sum(t.rows_out for t in plan.backward if t.view is None)
        self._put(("arriving", a.module, a.microbatch, a.stage), COMMUNICATION, float(arriving * row))


def _wide(one: Owned, stored: int) -> float:
    return float(one.unit.whole.trained * stored)


def inputs_bytes(rank: RankPlan) -> float:
    """What a step is given on a rank: ids, labels and where rows go, and the inputs of encoders."""
    total = 0.0
    blueprint, depths = rank.blueprint, rank.blueprint.llm.mtp_layers
    for i, mb in enumerate(rank.plan.microbatches):
        for m in rank.modules:
            if m == SINK:
                load = rank.tokens(i)
                total += load.tokens * (16.0 * (1 + depths) + len(blueprint.inputs.encoders))
                total += 8.0 * sum(load.supervised)
                layout, at = blueprint.layouts[m], rank.at(m)
                entering = (rows_entering(mb, e, layout, at) for e, edge in mb.edges.items() if edge.count)
                total += 8.0 * sum(entering)
            elif rank.at(m).pp == 0 and mb.edges[m].count:
                use = blueprint.inputs.encoders[m]
                width = math.prod(use.cls.input_shape(use.cfg))
                item = blueprint.dtype if use.cls.input_dtype is None else use.cls.input_dtype
                counts = [use.cls.input_count(use.cfg, meta) for meta in rank.metas(m, i)]
                total += sum(counts) * width * item.itemsize
    return total
