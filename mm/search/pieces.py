"""What modules ask of their ranks, priced piece by piece and remembered: what bounds are made of.

A prediction prices the micro-batch of median load of the data rank with most work, and takes the others to
cost as much for each FLOP, but for launches. So what a module computes in a step is its FLOPs times the
seconds of one, and launches. Two lower bounds follow (docs/planning_search.md):

- Of the language model, once its degrees and micro-batches are known: the very micro-batches of that rank.
- Of encoders, whose items are dealt by what else their ranks compute, and of a language model of which less
  is known: the rank with most has the mean share at least, and no FLOP takes less than in a large batch of
  the kind of items, or of the documents at the corners of the step's, that takes least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.predict.count.layers import first_counts, last_counts, layer_counts
from mm.predict.count.pieces import How, Piece
from mm.predict.count.sizes import Degrees as Split
from mm.predict.count.sizes import TokenLoad
from mm.predict.hardware import Hardware
from mm.predict.links import Place, Places, message_seconds
from mm.predict.price import price
from mm.predict.work import Message
from mm.search.bound import Demand
from mm.search.candidate import Choice, Degrees
from mm.search.load import StepLoad
from mm.search.weights import Weights
from parallel.topology.groups import Group, GroupPlan
from parallel.topology.stage import Stage

Again = tuple[str, ...]
Part = tuple[str, int | None]  # a layer by its symbol, with its index where that matters; "first", "last"


class Cost(NamedTuple):
    """A part of a stage in a micro-batch. forward, early, late: seconds of its forward and of both halves of
    its backward that grow with the load. launched, relaunched: those of its forward and backward that do not.
    kept: bytes between them. flops: of its forward. out: bytes that it gives."""

    forward: float = 0.0
    early: float = 0.0
    late: float = 0.0
    launched: float = 0.0
    relaunched: float = 0.0
    kept: float = 0.0
    flops: float = 0.0
    out: float = 0.0

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """With another part, so many times."""
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))

    def scaled(self, by: float) -> Cost:
        """A part of another load."""
        return Cost(*(by * a for a in self))

    def with_launches(self) -> Cost:
        """All seconds in the parts of the micro-batch."""
        return self._replace(forward=self.forward + self.launched, early=self.early + self.relaunched)

    @property
    def seconds(self) -> float:
        """That grow with the load."""
        return self.forward + self.early + self.late

    @property
    def fixed(self) -> float:
        """Seconds that do not."""
        return self.launched + self.relaunched


class Mean(NamedTuple):
    """A micro-batch of mean load, by stage, launches in its parts. least, most: load of the lightest and of
    the heaviest micro-batch over that; None where it is not known."""

    stages: Sequence[Cost]
    least: float
    most: float | None


class Unit(NamedTuple):
    """By stage, the cost of a unit of load, and launches of a micro-batch. even: the least FLOPs of a unit of
    load over the most."""

    stages: tuple[tuple[Cost, Cost], ...]
    even: float


def least_cost(costs: Iterable[Cost]) -> Cost:
    """The least of some costs, one by one."""
    return Cost(*map(min, zip(*costs, strict=True)))


@dataclass
class Priced:
    """What modules share: counts become costs. node: ranks a node."""

    blueprint: Blueprint
    hardware: Hardware
    node: int | None

    def cost(self, piece: Piece, places: Places) -> Cost:
        """What a counted piece costs."""
        works = piece.forward, piece.backward_input, piece.backward_weight
        found = [price(work, places, self.hardware) for work in works]
        fixed = [p.fixed for p in found]
        grows = [p.seconds - p.fixed for p in found]
        return Cost(*grows, fixed[0], fixed[1] + fixed[2], piece.kept, piece.forward.flops, piece.out)

    def how(self, module: str, again: Again) -> How:
        """How a module computes."""
        parts = frozenset(again) if module == SINK else frozenset(again) & {"full"}
        return How(
            item=self.blueprint.dtype.itemsize,
            recompute=parts,
            trains=module not in self.blueprint.frozen,
            below=module == SINK,
        )

    def places(self, module: str, d: Degrees) -> Places:
        """Where groups of these degrees are, at best: next to each other, with their links for themselves."""
        spans = {"tp": (d.tp, 1), "cp": (d.cp, d.tp), "etp": (d.etp, 1), "ep": (d.ep, d.etp)}
        known = {}
        for axis, (ranks, stride) in spans.items():
            nodes = 1 if self.node is None else min(ranks, -(-ranks * stride // self.node))
            known[Group("module", module, axis)] = Place(ranks, nodes, -(-ranks // nodes))
        return Places(GroupPlan(self.blueprint.world, {}), self.node, known)

    def hop(self, choice: Choice, size: float) -> float:
        """Seconds of hidden states of so many bytes from one pipeline rank to the next."""
        across = self.node is not None and choice.block.size // choice.degrees.pp >= self.node
        place = Place(2, 2 if across else 1, 1 if across else 2)
        return message_seconds(Message("send", Group("module", "", "pp"), size), place, self.hardware)


@dataclass
class Sink:
    """The language model's costs."""

    priced: Priced
    load: StepLoad
    weights: Weights
    _known: dict[object, Cost] = field(default_factory=dict)
    _flops: dict[object, float] = field(default_factory=dict)
    _units: dict[tuple[Degrees, Again], Unit] = field(default_factory=dict)

    def stages(self, choice: Choice, microbatches: int, again: Again) -> Mean:
        """As a prediction has it; bytes of the data rank that keeps least."""
        d = choice.degrees
        dealt = self.load.dealt(choice.dp, microbatches, d.tp, d.cp)
        flops = [self._flops_of(load, d) for load in dealt.loads]
        order = sorted(range(microbatches), key=lambda k: flops[k])
        median = order[microbatches // 2]
        load = dealt.loads[median]
        found = [self._stage(stage, d, load, again) for stage in self.weights.stages(d.pp * d.vpp)]
        grows, fixed = sum(c.seconds for c in found), sum(c.fixed for c in found)
        share = fixed / (grows + fixed)  # that does not grow with the load
        loads = [share + (1 - share) * f / flops[median] for f in flops]
        mean = sum(loads) / microbatches
        light = dealt.light / d.cp / load.tokens
        costs = [c.with_launches().scaled(mean)._replace(kept=c.kept * light, out=c.out) for c in found]
        return Mean(costs, loads[order[0]] / mean, loads[order[-1]] / mean)

    def envelope(self, choice: Choice, microbatches: int, again: Again) -> Mean:
        """At least, from the costs of its documents alone; no bytes."""
        d = choice.degrees
        costs = self.load.dealt(choice.dp, microbatches).costs
        mean, unit = sum(costs) / microbatches, self._unit(d, again)
        out = [c.scaled(mean).plus(launched).with_launches() for c, launched in unit.stages]
        least = min(costs) / mean * unit.even if mean else 0.0
        return Mean(out, least if microbatches > 1 else 1.0, None)

    def _unit(self, d: Degrees, again: Again) -> Unit:
        """The least that documents cost here, for each FLOP by which they are dealt."""
        if (d, again) not in self._units:
            whole = Stage(0, self.weights.layers(SINK))
            all_ = [self._corner(whole, d, k, again) for k in self._corners]
            rates = [w.flops / self._corner_cost(k) for k, w in enumerate(all_)]  # FLOPs here for those
            out = []
            for stage in self.weights.stages(d.pp * d.vpp):
                each = [self._corner(stage, d, k, again) for k in self._corners]
                cost = least_cost(c.scaled(min(rates) / w.flops) for c, w in zip(each, all_, strict=True))
                launched = self._least_launches(stage, d, again) if d.pp == 1 else Cost()
                out.append((cost._replace(kept=0.0, out=0.0), launched))
            self._units[d, again] = Unit(tuple(out), min(rates) / max(rates))
        return self._units[d, again]

    @property
    def _corners(self) -> range:
        return range(len(self.load.corners))

    def seconds(self, degrees: Degrees) -> float:
        """Of all ranks together, in a step, at least."""
        stage = Stage(0, self.weights.layers(SINK))
        whole = [self._corner(stage, degrees, k, ()) for k in self._corners]
        rate = min(w.flops / self._corner_cost(k) for k, w in enumerate(whole))
        cost = float(self.load.plan.llm_cost.sum()) * degrees.tp
        return min(w.seconds / w.flops for w in whole) * rate * cost

    def _corner_cost(self, k: int) -> float:
        """FLOPs by which the documents of a corner's load would be dealt."""
        corner = self.load.corners[k]
        return corner.cost * max(1, self._tokens // corner.length)

    @cached_property
    def _tokens(self) -> int:
        return int(self.load.plan.table.length.sum())

    def _corner(self, stage: Stage, d: Degrees, k: int, again: Again) -> Cost:
        """The part of a micro-batch of a corner's documents as large as the step, launches left out."""
        key = "corner", stage, d._replace(pp=1, vpp=1), k, again
        if key not in self._known:
            load = self.load.corner_load(self.load.corners[k], self._tokens, d.tp, d.cp)
            found = self._stage(stage, d._replace(cp=1), load, again)
            self._known[key] = found._replace(launched=0.0, relaunched=0.0).scaled(1 / d.cp)
        return self._known[key]

    def _least_launches(self, stage: Stage, d: Degrees, again: Again) -> Cost:
        shortest = min(self.load.corners)
        load = self.load.corner_load(shortest._replace(length=max(1, shortest.length // d.cp)), 1, d.tp, 1)
        found = self._stage(stage, d._replace(cp=1), load, again)
        return Cost(launched=found.launched, relaunched=found.relaunched)

    def _stage(self, stage: Stage, d: Degrees, load: TokenLoad, again: Again) -> Cost:
        cost = Cost()
        for part, times in self._parts(stage).items():
            found = self._part(part, d, load, again)
            if part[0] == "last":  # what it keeps goes by tokens with a loss, of which a rank may have few
                found = found._replace(kept=0.0)
            cost = cost.plus(found, times)._replace(out=found.out)
        return cost

    def _parts(self, stage: Stage) -> Counter[Part]:
        """The parts of a stage by kind: layers by symbol, and its ends."""
        llm = self.priced.blueprint.llm
        found: Counter[Part] = Counter()
        found["first", None] += stage.first
        for i in stage.layers:
            own = llm.symbols[i] == "*" and (llm.window is not None or llm.rope_skips)
            found[llm.symbols[i], i if own else None] += 1
        found["last", None] += stage.last
        return +found

    def _part(self, part: Part, d: Degrees, load: TokenLoad, again: Again) -> Cost:
        if part[0] != "E" and not (part[0] == "last" and self.priced.blueprint.llm.mtp_layers):
            d = d._replace(ep=1, etp=1)
        key = part, d.tp, d.cp, d.ep, d.etp, load, again
        if key not in self._known:
            piece = self._piece(part, d, load, again)
            self._known[key] = self.priced.cost(piece, self.priced.places(SINK, d))
        return self._known[key]

    def _piece(self, part: Part, d: Degrees, load: TokenLoad, again: Again) -> Piece:
        split = Split(SINK, d.tp, d.cp, d.ep, d.etp, d.sequence_parallel)
        how, llm = self.priced.how(SINK, again), self.priced.blueprint.llm
        if part[0] == "first":
            return first_counts(llm, split, load.tokens, (), how)
        if part[0] == "last":
            return last_counts(llm, split, load, how)
        return layer_counts(llm, part[0], part[1], split, load, how)

    def _flops_of(self, load: TokenLoad, d: Degrees) -> float:
        """Of a micro-batch's forward, which do not depend on how experts are split."""
        key = load, d.tp, d.cp
        if key not in self._flops:
            stage = Stage(0, self.weights.layers(SINK))
            parts = self._parts(stage).items()
            one = d._replace(ep=1, etp=1)
            self._flops[key] = sum(n * self._piece(p, one, load, ()).forward.flops for p, n in parts)
        return self._flops[key]


@dataclass
class Pieces:
    """See tree.Asked. blueprint: the job with every module data parallel, for what does not depend on
    layouts. load: of a step. node: ranks a node."""

    blueprint: Blueprint
    load: StepLoad
    hardware: Hardware
    node: int | None
    _known: dict[object, Demand] = field(default_factory=dict)
    _least: dict[object, float] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Weights:
        """What data ranks hold and move."""
        return Weights(self.blueprint, self.hardware, self.node)

    @cached_property
    def sink(self) -> Sink:
        """The language model."""
        return Sink(self._priced, self.load, self.weights)

    @cached_property
    def _priced(self) -> Priced:
        return Priced(self.blueprint, self.hardware, self.node)

    @cached_property
    def _encoders(self) -> dict[str, Encoder]:
        from mm.search.items import Encoder

        return {m: Encoder(m, self._priced, self.load, self.weights) for m in self.blueprint.inputs.encoders}

    def least(self, module: str, size: int, degrees: Degrees | None) -> float:
        """See tree.Asked: the whole step at the load at which kernels are most efficient, shared evenly."""
        key = module, degrees if degrees is None else (degrees.tp, degrees.ep, degrees.etp)
        if key not in self._least:
            self._least[key] = self._seconds(module, degrees)
        return self._least[key] / size

    def _seconds(self, module: str, degrees: Degrees | None) -> float:
        """Seconds of all ranks together, at least."""
        if degrees is None:
            tps = [d for d in (1, 2, 4, 8) if self._divides(module, d)]
            return min(self._seconds(module, Degrees(tp=tp, sequence_parallel=tp > 1)) for tp in tps)
        if module == SINK:
            return self.sink.seconds(degrees._replace(cp=1))
        return self._encoders[module].seconds(degrees)

    def _divides(self, module: str, tp: int) -> bool:
        from llm.checks import check
        from parallel.topology.layout import Unfit

        try:
            if module == SINK:
                check(self.blueprint.llm, tp)
            else:
                use = self.blueprint.inputs.encoders[module]
                use.cls.check(use.cfg, tp if use.cls.tensor_parallel else 1)
        except (Unfit, ValueError):
            return False
        return True

    def demand(
        self, module: str, choice: Choice, microbatches: int, again: Again, kind: str, *, closely: bool = True
    ) -> Demand | None:
        """See tree.Asked."""
        halves = kind == "zero_bubble" and module == SINK
        key = (module, choice.block.size, choice[1:], microbatches, again, halves, closely)
        if key not in self._known:
            if module == SINK:
                self._known[key] = self._sink_demand(choice, microbatches, again, halves, closely)
            else:
                self._known[key] = self._encoder_demand(module, choice, microbatches, again)
        return self._known[key]

    def _sink_demand(self, choice: Choice, m: int, again: Again, halves: bool, closely: bool) -> Demand:
        d = choice.degrees
        if closely:
            found = self.sink.stages(choice, m, again)
            dealt = self.load.dealt(choice.dp, m, d.tp, d.cp)
            made = self._made(SINK, choice, found, (m, halves))
            made = made._replace(
                uneven=(1 - dealt.even) * dealt.tokens / dealt.light,
                thin=dealt.thin / dealt.light,
                share=dealt.share,
            )
        else:
            made = self._made(SINK, choice, self.sink.envelope(choice, m, again), (m, halves))
            made = made._replace(kept=(0.0,) * len(made.kept), share=0.0)
        return made._replace(update=made.update + self.weights.message)

    def _encoder_demand(self, module: str, choice: Choice, m: int, again: Again) -> Demand:
        encoder = self._encoders[module]
        even = encoder.even(choice.dp, m)
        least = 1.0 if even or m == 1 else 0.0
        made = self._made(module, choice, Mean(encoder.stages(choice, m, again), least, None), (m, False))
        return made._replace(share=float(even), fixed=encoder.launches(choice, again))

    def _made(self, module: str, choice: Choice, mean: Mean, how: tuple[int, bool]) -> Demand:
        (m, halves), d, costs = how, choice.degrees, mean.stages
        late = 1.0 if halves else 0.0
        owned = [self.weights.held(module, choice, pp) for pp in range(d.pp)]
        each, sums, before, after = self.weights.traffic(
            module, choice, [(c.forward, c.early + c.late) for c in costs], m, mean.most
        )
        size = max((c.out for c in costs[:-1]), default=0.0)
        return Demand(
            pp=d.pp,
            forward=tuple(c.forward + g for c, g in zip(costs, each, strict=True)),
            backward=tuple(c.early + c.late + r for c, r in zip(costs, sums, strict=True)),
            early=tuple(c.early + (1 - late) * c.late for c in costs),
            before=before,
            after=after,
            update=max(o.update for o in owned),
            held=tuple(o.held for o in owned),
            gradients=tuple(o.gradients for o in owned),
            kept=tuple(c.kept for c in costs),
            hop=self._priced.hop(choice, size) if size else 0.0,
            least=mean.least,
        )
