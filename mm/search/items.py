"""What an encoder costs a data rank at least, from the kinds of items of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from encoders.fastconformer import FastConformer
from encoders.module import encoder_stages
from encoders.vit import ViT
from mm.plan.inputs import EncoderUse
from mm.plan.projectors import projector_kind
from mm.predict.count.load import items_load
from mm.predict.count.sizes import Degrees as Split
from mm.predict.count.stage import Frozen, Outer, encoder_stage
from mm.search.candidate import Choice, Degrees
from mm.search.costs import Again, Cost, Priced, least_cost
from mm.search.load import Meta, StepLoad
from mm.search.weights import Weights
from parallel.topology.layout import Coord, make_layout
from parallel.topology.stage import Stage

MANY = 256  # items counted at once: beyond, kernels only grow in number
KINDS = 12  # of items that are counted, from the cheapest to the costliest


@dataclass
class Encoder:
    """An encoder's costs."""

    module: str
    priced: Priced
    load: StepLoad
    weights: Weights
    _known: dict[object, Cost] = field(default_factory=dict)
    _units: dict[object, tuple[Cost, ...]] = field(default_factory=dict)

    @property
    def _use(self) -> EncoderUse:
        return self.priced.blueprint.inputs.encoders[self.module]

    @cached_property
    def _kinds(self) -> tuple[Meta, ...]:
        """Kinds of items, cheapest first."""
        found = {str(dict(meta)): meta for meta in self.load.items[self.module]}
        every = sorted(found.values(), key=self._use.cost)
        if len(every) <= KINDS:
            return tuple(every)
        return tuple(every[i * (len(every) - 1) // (KINDS - 1)] for i in range(KINDS))

    @cached_property
    def _cost(self) -> float:
        """FLOPs of all items of the step, by which they are dealt."""
        return float(self.load.plan.items[self.module].cost.sum())

    def even(self, dp: int, microbatches: int) -> bool:
        """Whether each data rank has as much in each micro-batch, whatever else it computes."""
        n = len(self.load.items[self.module])
        return self.load.alike and len(self._kinds) == 1 and n % (dp * microbatches) == 0

    def stages(self, choice: Choice, microbatches: int, again: Again) -> list[Cost]:
        """By stage, the least cost of a micro-batch of mean load; bytes of one where items allow to tell."""
        tell = microbatches == 1 or self.even(choice.dp, microbatches)
        mean = self._cost / choice.dp / microbatches
        found = [c.scaled(mean / choice.degrees.cp) for c in self._unit(choice.degrees, again)]
        return found if tell else [c._replace(kept=0.0) for c in found]

    def _unit(self, d: Degrees, again: Again) -> tuple[Cost, ...]:
        """By stage, the least that items cost for each FLOP by which they are dealt."""
        key = d.tp, d.pp, again
        if key not in self._units:
            self._units[key] = tuple(self._stage_units(d, again))
        return self._units[key]

    def _stage_units(self, d: Degrees, again: Again) -> Iterator[Cost]:
        stages = encoder_stages(self._use.cls, self._use.cfg, d.pp)
        if not self._cost:
            yield from (Cost() for _ in stages)
            return
        whole = [self._of(Stage(0, self.weights.layers(self.module)), d, k, again) for k in self._every]
        rate = min(w.flops / self._dealt_by(k) for k, w in enumerate(whole))
        bytes_ = [w.kept / self._dealt_by(k) for k, w in enumerate(whole)]
        even = min(bytes_) / max(bytes_) if max(bytes_) else 0.0
        for stage in stages:
            each = [self._of(stage, d, k, again) for k in self._every]
            cost = least_cost(c.scaled(rate / w.flops) for c, w in zip(each, whole, strict=True))
            kept = min(c.kept / self._dealt_by(k) for k, c in enumerate(each)) * even
            yield cost._replace(kept=kept, out=0.0)

    def launches(self, choice: Choice, again: Again) -> float:
        """Seconds of a step that no load changes: a data rank has items in one micro-batch at least."""
        if choice.degrees.pp > 1 or not self._cost:
            return 0.0
        stage = Stage(0, self.weights.layers(self.module))
        return self._counted(stage, choice.degrees, (0, 1), again).fixed

    def seconds(self, degrees: Degrees) -> float:
        """Of all ranks together, in a step, at least."""
        if not self._cost:
            return 0.0
        stage = Stage(0, self.weights.layers(self.module))
        whole = [self._of(stage, degrees, k, ()) for k in self._every]
        rate = min(w.flops / self._dealt_by(k) for k, w in enumerate(whole))
        return min(w.seconds / w.flops for w in whole) * rate * self._cost * degrees.tp

    @property
    def _every(self) -> range:
        return range(len(self._kinds))

    def _dealt_by(self, kind: int) -> float:
        return self._use.cost(self._kinds[kind]) * MANY

    def _of(self, stage: Stage, d: Degrees, kind: int, again: Again) -> Cost:
        """MANY items of a kind, launches left out."""
        return self._counted(stage, d, (kind, MANY), again)._replace(launched=0.0, relaunched=0.0)

    def _counted(self, stage: Stage, d: Degrees, items: tuple[int, int], again: Again) -> Cost:
        n, cost = self.weights.layers(self.module), Cost()
        parts = {stage: 1}
        if self._use.cls in (ViT, FastConformer):  # whose layers are alike
            parts = {Stage(1, 2, first=False, last=False): len(stage.layers)}
            parts |= {Stage(0, 0, first=True, last=False): 1} if stage.first else {}
            parts |= {Stage(n, n, first=False, last=True): 1} if stage.last else {}
        for part, times in parts.items():
            key = part, d.tp, items, again
            if key not in self._known:
                self._known[key] = self._part(part, d, items, again)
            cost = cost.plus(self._known[key], times)
        return cost

    def _part(self, stage: Stage, d: Degrees, items: tuple[int, int], again: Again) -> Cost:
        blueprint, use, module = self.priced.blueprint, self._use, self.module
        enc = blueprint.cfg.model[module]
        layout = make_layout(module, d.tp, {"tp": d.tp, "sequence_parallel": d.sequence_parallel})
        metas = [self._kinds[items[0]]] * items[1]
        load = items_load(replace(use, layout=layout), metas, Coord(0, 0, 0, 0), module)
        frozen = Frozen(
            enc.freeze_layers, enc.freeze in ("encoder", "all"), enc.freeze in ("projector", "all")
        )
        outer = Outer(enc.projector.hidden, blueprint.llm.d_model, projector_kind(enc.projector))
        split = Split(module, d.tp, sequence_parallel=d.sequence_parallel)
        how = self.priced.how(module, again)
        piece = encoder_stage(use, stage, split, load, how, frozen=frozen, outer=outer)
        return self.priced.cost(piece, self.priced.places(module, d._replace(cp=1)))
