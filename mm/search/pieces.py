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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llm.checks import check
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.predict.hardware import Hardware
from mm.search.bound import Demand, Floor, Open
from mm.search.candidate import Block, Choice, Degrees
from mm.search.costs import Again, Mean, Priced
from mm.search.floors import floors
from mm.search.items import Encoder
from mm.search.load import StepLoad
from mm.search.space import ANY
from mm.search.tokens import Sink
from mm.search.weights import Weights


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
    _floors: dict[object, Sequence[Sequence[Floor]]] = field(default_factory=dict)
    _options: dict[object, tuple[float, float, float]] = field(default_factory=dict)

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
        return {m: Encoder(m, self._priced, self.load, self.weights) for m in self.blueprint.inputs.encoders}

    def least(self, module: str, size: int, degrees: Degrees | None) -> float:
        """See tree.Asked: the whole step at the load at which kernels are most efficient, shared evenly, or
        as evenly as documents can be."""
        key = module, degrees and (degrees.tp, min(degrees.cp, 2), degrees.ep, degrees.etp)
        if key not in self._least:
            self._least[key] = self._seconds(module, degrees)
        # Ranks that share cores wait for all of them, not for the one with most.
        alone = module == SINK and degrees is not None and self.hardware.host is None
        return self._least[key] / size * (self.load.share(degrees.dp(size)) if alone and degrees else 1.0)

    def _seconds(self, module: str, degrees: Degrees | None) -> float:
        """Seconds of all ranks together, at least."""
        if degrees is None:
            tps = [d for d in (1, 2, 4, 8) if self._divides(module, d)]
            some = [Degrees(tp=tp, cp=cp, sequence_parallel=tp > 1) for tp in tps for cp in (1, 2)]
            return min(self._seconds(module, d) for d in some)
        if module == SINK:
            return self.sink.seconds(degrees._replace(cp=min(degrees.cp, 2)))
        return self._encoders[module].seconds(degrees)

    def _divides(self, module: str, tp: int) -> bool:
        try:
            if module == SINK:
                check(self.blueprint.llm, tp)
            else:
                use = self.blueprint.inputs.encoders[module]
                use.cls.check(use.cfg, tp if use.cls.tensor_parallel else 1)
        except ValueError:
            return False
        return True

    def demand(
        self, module: str, choice: Choice, microbatches: int, again: Again, kind: str
    ) -> Demand | None:
        """See tree.Asked."""
        halves = kind == "zero_bubble" and module == SINK
        key = (module, choice.block.size, choice[1:], microbatches, again, halves)
        if key not in self._known:
            if module == SINK:
                self._known[key] = self._sink_demand(choice, microbatches, again, halves)
            else:
                self._known[key] = self._encoder_demand(module, choice, microbatches, again)
        return self._known[key]

    def floors(
        self, block: Block, degrees: Degrees, policies: Sequence[str], numbers: Sequence[int], again: Again
    ) -> Sequence[Sequence[Floor]]:
        """See tree.Asked."""
        key = block.size, degrees, again
        if key not in self._floors:
            self._floors[key] = floors(self.sink, block, degrees, policies, numbers, again)
        return self._floors[key]

    def options(
        self, module: str, block: Block, degrees: Sequence[Degrees], m: int, again: Again
    ) -> Open | None:
        """See tree.Asked. Work and weights do not depend on micro-batches where no policy is decided."""
        if not degrees:
            return None
        key = module, block.size, again
        if key not in self._options:
            every = [self._encoder_demand(module, Choice(block, d, ANY), 1, again) for d in degrees]
            seconds = min(min(e.work(p, 1) for p in range(e.pp)) for e in every)
            through = min(e.heaviest for e in every)
            self._options[key] = seconds, min(min(e.held) for e in every), through
        encoder = self._encoders[module]
        even = all(encoder.even(d.dp(block.size), m) for d in degrees)
        seconds, held, through = self._options[key]
        return Open(block, seconds, held, float(even), through / m)

    def _sink_demand(self, choice: Choice, m: int, again: Again, halves: bool) -> Demand:
        d = choice.degrees
        dealt = self.load.dealt(choice.dp, m, d.tp, d.cp)
        made = self._made(SINK, choice, self.sink.stages(choice, m, again), (m, halves))
        return made._replace(
            uneven=(1 - dealt.even) * dealt.tokens / dealt.light,
            thin=dealt.thin / dealt.light,
            share=dealt.share,
            update=made.update + self.weights.message,
        )

    def _encoder_demand(self, module: str, choice: Choice, m: int, again: Again) -> Demand:
        encoder = self._encoders[module]
        even = encoder.even(choice.dp, m)
        least = 1.0 if even or m == 1 else 0.0
        made = self._made(module, choice, Mean(encoder.stages(choice, m, again), least, None), (m, False))
        return made._replace(share=float(even), fixed=encoder.launches(choice, again))

    def _made(self, module: str, choice: Choice, mean: Mean, how: tuple[int, bool]) -> Demand:
        (m, halves), d, costs = how, choice.degrees, mean.stages
        late = 1.0 if halves else 0.0
        owned = self.weights.held(module, choice)
        both = np.array([(c.forward, c.early + c.late) for c in costs]).T
        half = np.array([c.late for c in costs]) if halves else None
        each, sums, before, after = self.weights.traffic(
            module, choice, (both[0], both[1], half), m, mean.most
        )
        size = max((c.out for c in costs[:-1]), default=0.0)
        return Demand(
            pp=d.pp,
            forward=tuple((both[0] + each).tolist()),
            backward=tuple((both[1] + sums).tolist()),
            early=tuple(c.early + (1 - late) * c.late for c in costs),
            before=before,
            after=after,
            update=max(o.update for o in owned),
            held=tuple(o.held for o in owned),
            gradients=tuple(o.gradients for o in owned),
            kept=tuple(c.kept for c in costs),
            hop=self._priced.hop(choice, size) if size else 0.0,
            least=mean.least,
            ends=mean.ends,
        )
