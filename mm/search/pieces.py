"""What modules ask of their ranks, priced piece by piece and remembered: what bounds are made of.

The busiest rank has at least the mean share of a step: so many mean documents and items. What crosses context
parallel ranks, padding and ragged loads only add to it. mm.predict counts and prices layers, once for each
kind of layer, degrees and load; sums over stages are made here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from encoders.fastconformer import FastConformer
from encoders.module import encoder_stages
from encoders.vit import ViT
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.projectors import projector_kind
from mm.predict.count.layers import first_counts, last_counts, layer_counts
from mm.predict.count.load import items_load
from mm.predict.count.pieces import How, Piece
from mm.predict.count.sizes import Degrees as Split
from mm.predict.count.stage import Frozen, Outer, encoder_stage
from mm.predict.hardware import Hardware
from mm.predict.links import Place, Places
from mm.predict.price import price
from mm.search.bound import Demand
from mm.search.candidate import Choice, Degrees
from mm.search.load import StepLoad
from mm.search.weights import Weights
from parallel.topology.groups import Group, GroupPlan
from parallel.topology.layout import Coord, make_layout
from parallel.topology.stage import Stage

RAGGED = 0.95  # the share of a bound that holds where documents differ, as kernels of other sizes are priced
MOST_ITEMS = 256  # counted at once: beyond, kernels only grow in number


class Cost(NamedTuple):
    """A part of a stage in a micro-batch: seconds of its forward, of both halves of its backward, and bytes
    that it keeps between them."""

    forward: float = 0.0
    early: float = 0.0
    late: float = 0.0
    kept: float = 0.0

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """With another part, so many times."""
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))

    def scaled(self, by: float) -> Cost:
        """A part of another load."""
        return Cost(*(by * a for a in self))


@dataclass
class Pieces:
    """blueprint: the job with every module data parallel, for what does not depend on layouts. load: of a
    step. node: ranks a node."""

    blueprint: Blueprint
    load: StepLoad
    hardware: Hardware
    node: int | None
    _known: dict[object, object] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Weights:
        """What data ranks hold and move."""
        return Weights(self.blueprint, self.hardware, self.node)

    def least(self, module: str, size: int, degrees: Degrees | None) -> float:
        """See tree.Asked: the whole step at the size at which kernels are most efficient, shared evenly."""
        key = "least", module, degrees if degrees is None else (degrees.tp, degrees.ep, degrees.etp)
        if key not in self._known:
            self._known[key] = self._seconds(module, degrees)
        seconds = self._known[key]
        assert isinstance(seconds, float)
        return seconds / size * self._slack

    @property
    def _slack(self) -> float:
        return RAGGED if self.load.ragged else 1.0

    def _seconds(self, module: str, degrees: Degrees | None) -> float:
        """Seconds of all ranks together, at least."""
        if degrees is None:
            tps = [d for d in (1, 2, 4, 8) if self._divides(module, d)]
            return min(self._seconds(module, Degrees(tp=tp, sequence_parallel=tp > 1)) for tp in tps)
        if module != SINK:
            n = len(self.load.items[module])
            whole = self._encoder(
                module, degrees, Stage(0, self.weights.layers(module)), min(n, MOST_ITEMS), ()
            )
            return sum(whole[:3]) * degrees.tp * n / max(1, min(n, MOST_ITEMS))
        n = self.load.documents
        cost = Cost()
        for part, times in self._parts(Stage(0, self.weights.layers(SINK))).items():
            cost = cost.plus(self._part(part, degrees._replace(cp=1), n, (), False), times)
        return sum(cost[:3]) * degrees.tp * self.load.documents / n

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
        self, module: str, choice: Choice, microbatches: int, again: tuple[str, ...], kind: str
    ) -> Demand | None:
        """See tree.Asked."""
        halves = kind == "zero_bubble" and module == SINK
        key = (module, choice.block.size, choice[1:], microbatches, again, halves)
        if key not in self._known:
            self._known[key] = self._demand(module, choice, microbatches, again, halves)
        found = self._known[key]
        assert found is None or isinstance(found, Demand)
        return found

    def _demand(
        self, module: str, choice: Choice, microbatches: int, again: tuple[str, ...], halves: bool
    ) -> Demand:
        degrees, slack = choice.degrees, self._slack
        if module == SINK:
            costs = self._sink_stages(choice, microbatches, again, halves)
        else:
            costs = self._encoder_stages(module, choice, microbatches, again)
        late = 1.0 if halves else 0.0
        held, update = zip(*(self.weights.held(module, choice, pp) for pp in range(degrees.pp)), strict=True)
        each, sums, before, after = self.weights.traffic(
            module, choice, [(c.forward, c.early + c.late) for c in costs], microbatches
        )
        return Demand(
            pp=degrees.pp,
            forward=tuple(slack * c.forward + g for c, g in zip(costs, each, strict=True)),
            backward=tuple(slack * (c.early + c.late) + r for c, r in zip(costs, sums, strict=True)),
            early=tuple(slack * (c.early + (1 - late) * c.late) for c in costs),
            before=before,
            after=after,
            update=update,
            held=held,
            kept=tuple(slack * c.kept for c in costs),
            least=0.0 if self.load.ragged else 1.0,
        )

    # The language model.

    def _sink_stages(
        self, choice: Choice, microbatches: int, again: tuple[str, ...], halves: bool
    ) -> list[Cost]:
        d = choice.degrees
        share = self.load.share(choice.dp, microbatches)
        whole = at_least(share)
        out = []
        for stage in self.weights.stages(d.pp * d.vpp):
            cost = Cost()
            for part, times in self._parts(stage).items():
                cost = cost.plus(self._part(part, d, whole, again, halves), times)
            out.append(cost.scaled(share / whole))
        return out

    def _parts(self, stage: Stage) -> Counter[tuple[str, int | None]]:
        """The parts of a stage of the language model by kind: layers by symbol, and its ends."""
        llm = self.blueprint.llm
        found: Counter[tuple[str, int | None]] = Counter()
        for i in stage.layers:
            own = llm.symbols[i] == "*" and (llm.window is not None or llm.rope_skips)
            found[llm.symbols[i], i if own else None] += 1
        found["first", None] += stage.first
        found["last", None] += stage.last
        return found

    def _part(
        self, part: tuple[str, int | None], d: Degrees, documents: int, again: tuple[str, ...], halves: bool
    ) -> Cost:
        key = part, d.tp, d.cp, d.ep, d.etp, documents, again, halves
        if key not in self._known:
            split = Split(SINK, d.tp, 1, d.ep, d.etp, d.sequence_parallel)
            load = self.load.tokens(documents, d.tp, d.cp)
            how, llm = self._how(SINK, again)._replace(halves=halves), self.blueprint.llm
            if part[0] == "first":
                piece = first_counts(llm, split, load.tokens, (), how)
            elif part[0] == "last":
                piece = last_counts(llm, split, load, how)
            else:
                piece = layer_counts(llm, part[0], part[1], split, load, how)
            self._known[key] = self._priced(piece, self._places(SINK, d))
        found = self._known[key]
        assert isinstance(found, Cost)
        return found

    # Encoders.

    def _encoder_stages(
        self, module: str, choice: Choice, microbatches: int, again: tuple[str, ...]
    ) -> list[Cost]:
        d, use = choice.degrees, self.blueprint.inputs.encoders[module]
        share = max(len(self.load.items[module]) / choice.dp, 1.0) / microbatches
        whole = min(at_least(share), MOST_ITEMS)
        if ("stages", module, d.pp) not in self._known:
            self._known["stages", module, d.pp] = encoder_stages(use.cls, use.cfg, d.pp)
        stages = self._known["stages", module, d.pp]
        assert isinstance(stages, tuple)
        by = share / whole / d.cp
        return [self._encoder(module, d, stage, whole, again).scaled(by) for stage in stages]

    def _encoder(self, module: str, d: Degrees, stage: Stage, items: int, again: tuple[str, ...]) -> Cost:
        key = module, d.tp, len(stage.layers), stage.first, stage.last, items, again
        if key not in self._known:
            cost, n = Cost(), self.weights.layers(module)
            cls = self.blueprint.inputs.encoders[module].cls
            parts = {stage: 1}
            if cls in (ViT, FastConformer):  # whose layers are alike
                parts = {Stage(1, 2, first=False, last=False): len(stage.layers)}
                parts |= {Stage(0, 0, first=True, last=False): 1} if stage.first else {}
                parts |= {Stage(n, n, first=False, last=True): 1} if stage.last else {}
            for part, times in parts.items():
                one = key[:2], part, items, again
                if one not in self._known:
                    self._known[one] = self._encoder_part(module, d, part, items, again)
                found = self._known[one]
                assert isinstance(found, Cost)
                cost = cost.plus(found, times)
            self._known[key] = cost
        found = self._known[key]
        assert isinstance(found, Cost)
        return found

    def _encoder_part(
        self, module: str, d: Degrees, stage: Stage, items: int, again: tuple[str, ...]
    ) -> Cost:
        blueprint, every = self.blueprint, self.load.items[module]
        if not every:
            return Cost()
        use, enc = blueprint.inputs.encoders[module], blueprint.cfg.model[module]
        layout = make_layout(module, d.tp, {"tp": d.tp, "sequence_parallel": d.sequence_parallel})
        metas = [every[i * len(every) // items] for i in range(items)]
        load = items_load(replace(use, layout=layout), metas, Coord(0, 0, 0, 0), module)
        frozen = Frozen(
            enc.freeze_layers, enc.freeze in ("encoder", "all"), enc.freeze in ("projector", "all")
        )
        outer = Outer(enc.projector.hidden, blueprint.llm.d_model, projector_kind(enc.projector))
        how = self._how(module, again)._replace(below=False)
        split = Split(module, d.tp, sequence_parallel=d.sequence_parallel)
        piece = encoder_stage(use, stage, split, load, how, frozen=frozen, outer=outer)
        mean = self._item_cost(module) / (sum(map(use.cost, metas)) / items)
        return self._priced(piece, self._places(module, d)).scaled(min(1.0, mean))

    def _item_cost(self, module: str) -> float:
        """FLOPs of a mean item."""
        key = "item", module
        if key not in self._known:
            use, every = self.blueprint.inputs.encoders[module], self.load.items[module]
            self._known[key] = sum(map(use.cost, every)) / len(every)
        found = self._known[key]
        assert isinstance(found, float)
        return found

    # Both.

    def _how(self, module: str, again: tuple[str, ...]) -> How:
        parts = frozenset(again) if module == SINK else frozenset(again) & {"full"}
        return How(
            item=self.blueprint.dtype.itemsize,
            recompute=parts,
            trains=module not in self.blueprint.frozen,
            below=True,
        )

    def _priced(self, piece: Piece, places: Places) -> Cost:
        works = piece.forward, piece.backward_input, piece.backward_weight
        forward, early, late = (price(work, places, self.hardware).seconds for work in works)
        return Cost(forward, early, late, piece.kept)

    def _places(self, module: str, d: Degrees) -> Places:
        """Where groups of these degrees are, at best: next to each other, with their links for themselves."""
        sizes = {"tp": d.tp, "etp": d.etp, "ep": d.ep * d.etp}
        known = {}
        for axis, span in sizes.items():
            ranks = d.ep if axis == "ep" else span
            nodes = 1 if self.node is None else -(-span // self.node)
            known[Group("module", module, axis)] = Place(ranks, min(nodes, ranks), -(-ranks // nodes))
        return Places(GroupPlan(self.blueprint.world, {}), self.node, known)


def at_least(share: float) -> int:
    """The next power of two: kernels of so many documents or items are no less efficient, and few differ."""
    return 1 << max(0, math.ceil(share) - 1).bit_length()
