"""What the language model costs the data rank with most work: as a prediction has it, or at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mm.config.outline import SINK
from mm.predict.count.layers import first_counts, last_counts, layer_counts
from mm.predict.count.pieces import Piece
from mm.predict.count.sizes import Degrees as Split
from mm.predict.count.sizes import TokenLoad
from mm.search.candidate import Choice, Degrees
from mm.search.costs import Again, Cost, Mean, Priced, Unit, least_cost
from mm.search.load import StepLoad
from mm.search.weights import Weights
from parallel.topology.stage import Stage

LARGE = 1 << 17  # each of hundreds of experts has thousands of rows then
Part = tuple[str, int | None]  # a layer by its symbol, with its index where that matters; "first", "last"


@dataclass
class Sink:
    """The language model's costs. large: tokens of a micro-batch, beyond which kernels only grow in count."""

    priced: Priced
    load: StepLoad
    weights: Weights
    large: int = LARGE
    _known: dict[object, Cost] = field(default_factory=dict)
    _flops: dict[object, float] = field(default_factory=dict)
    _units: dict[tuple[Degrees, Again], Unit] = field(default_factory=dict)

    def stages(self, choice: Choice, microbatches: int, again: Again) -> Mean:
        """As a prediction has it; bytes of the data rank that keeps least."""
        d = choice.degrees
        dealt = self.load.dealt(choice.dp, microbatches, d.tp, d.cp)
        loads = dealt.loads(self.load.blueprint)
        flops = [self._flops_of(load, d) for load in loads]
        order = sorted(range(microbatches), key=lambda k: flops[k])
        median = order[microbatches // 2]
        load = loads[median]
        found = [self._stage(stage, d, load, again) for stage in self.weights.stages(d.pp * d.vpp)]
        grows, fixed = sum(c.seconds for c in found), sum(c.fixed for c in found)
        share = fixed / (grows + fixed)  # that does not grow with the load
        shares = [share + (1 - share) * f / flops[median] for f in flops]
        mean = sum(shares) / microbatches
        light = dealt.light / d.cp / load.tokens
        costs = [c.with_launches().scaled(mean)._replace(kept=c.kept * light, out=c.out) for c in found]
        ends = shares[0] / mean, shares[-1] / mean
        return Mean(costs, shares[order[0]] / mean, shares[order[-1]] / mean, ends)

    def unit(self, d: Degrees, again: Again) -> Unit:
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
                out.append((*cost[:3], launched.launched, launched.relaunched))
            forward, early, late, launched, relaunched = np.array(out).T
            even = min(rates) / max(self._most_flops(k, d) / self._corner_cost(k) for k in self._corners)
            self._units[d, again] = Unit(forward, early, late, launched, relaunched, even)
        return self._units[d, again]

    @property
    def _corners(self) -> range:
        return range(len(self.load.corners))

    def seconds(self, degrees: Degrees) -> float:
        """Of all ranks together, in a step, at least."""
        stage = Stage(0, self.weights.layers(SINK))
        whole = [self._corner(stage, degrees, k, ()) for k in self._corners]
        rate = min(w.flops / self._corner_cost(k) for k, w in enumerate(whole))
        cost = float(self.load.plan.llm_cost.sum()) * degrees.tp * degrees.cp
        return min(w.seconds / w.flops for w in whole) * rate * cost

    def _corner_cost(self, k: int) -> float:
        """FLOPs by which the documents of a corner's load would be dealt."""
        return self.load.corners[k].cost * self._documents(k)

    @cached_property
    def _tokens(self) -> int:
        return int(self.load.plan.table.length.sum())

    def _documents(self, k: int) -> int:
        """Of a corner's load."""
        return max(1, min(self._tokens, self.large) // self.load.corners[k].length)

    def _corner(self, stage: Stage, d: Degrees, k: int, again: Again) -> Cost:
        """The part of a micro-batch of a corner's documents, launches left out: as large as the step, or,
        where that is larger than kernels need to be at their best, what so many more of them add."""
        key = "corner", stage, d._replace(pp=1, vpp=1, cp=min(d.cp, 2)), k, again
        if key not in self._known:
            corner, adds, seen = self.load.corners[k], self._tokens > 2 * self.large, d.cp > 1
            tokens = self._documents(k) * corner.length
            load = self.load.corner_load(corner, tokens, d.tp, seen=seen, up=adds)
            found = self._stage(stage, d._replace(cp=1), load, again)
            if adds:
                load = self.load.corner_load(corner, 2 * tokens, d.tp, seen=seen)
                found = self._stage(stage, d._replace(cp=1), load, again).plus(found, -1.0)
            self._known[key] = found._replace(launched=0.0, relaunched=0.0)
        return self._known[key].scaled(1 / d.cp)

    def _most_flops(self, k: int, d: Degrees) -> float:
        """Of a corner's documents, where every query has all keys."""
        tokens = self._documents(k) * self.load.corners[k].length
        load = self.load.corner_load(self.load.corners[k], tokens, d.tp)
        return self._flops_of(load, d._replace(cp=1)) / d.cp

    def _least_launches(self, stage: Stage, d: Degrees, again: Again) -> Cost:
        shortest = min(self.load.corners)
        if d.cp > 1:  # of a rank's part none may have a loss
            none = tuple(0.0 for _ in shortest.supervised)
            shortest = shortest._replace(length=max(1, shortest.length // d.cp), supervised=none)
        load = self.load.corner_load(shortest, 1, d.tp)
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
        # Of documents these layers know no more than how many tokens they have.
        own = (load.tokens, load.routed, load.widest) if part[0] in ("E", "-", "first") else load
        key = part, d.tp, d.cp, d.ep, d.etp, own, again
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
