"""What candidates are predicted to take: the full prediction, asked of the few whose bound is low."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mm.config.advice import with_changes
from mm.config.schema import Config
from mm.data.sample import Index
from mm.errors import Refused
from mm.plan.batches import Batches
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.known import Known
from mm.plan.step_plan import StepPlan
from mm.plan.table import SampleTable
from mm.predict.hardware import Hardware
from mm.predict.step import Prediction, Spread, drawn_plans, predict, shortfall
from mm.search.candidate import Candidate
from mm.virtual.samples import virtual_data
from parallel.sequence.intervals import Column


@dataclass(frozen=True)
class Judged:
    """A candidate with its prediction. why: why it cannot be run so; None where it can."""

    candidate: Candidate
    prediction: Prediction | None
    why: str | None = None

    @property
    def step_s(self) -> float:
        """Seconds of a step; only of one that has a prediction."""
        assert self.prediction is not None
        return self.prediction.step_s

    @property
    def bytes(self) -> float:
        """Of the fullest rank; 0 without a prediction."""
        return 0.0 if self.prediction is None else self.prediction.peak_memory_bytes


def on_nodes(cfg: Config, world: int, hardware: Hardware) -> Config:
    """The run on the hardware's nodes, where the config does not say how many ranks a node has."""
    size = hardware.links.node_size
    if cfg.run.node_size is not None or size is None or size >= world:
        return cfg
    return with_changes(cfg, {"run.node_size": size})


@dataclass
class Predictor:
    """Predictions of a config on `world` ranks. Step plans are shared by candidates that differ in schedule,
    policy or recomputation alone. index: of the data, or of made-up samples; note: which."""

    cfg: Config
    world: int
    hardware: Hardware
    note: str = ""
    _index: Index | None = None
    _tables: dict[bytes, SampleTable] = field(default_factory=dict)
    _plans: dict[object, StepPlan] = field(default_factory=dict)
    _known: Known = field(default_factory=Known)

    def judge(self, candidate: Candidate) -> Judged:
        """What a candidate takes; what cannot be so is said in words."""
        try:
            made = self.blueprint(candidate.config(self.cfg))
            found = predict(made, self.plan(made, candidate), self.hardware)
        except (Refused, ValueError) as error:
            return Judged(candidate, None, str(error))
        return Judged(candidate, found, shortfall(found, self.hardware))

    def of_config(self, cfg: Config) -> Prediction:
        """What a config as it stands takes. Raises Refused."""
        made = self.blueprint(cfg)
        return predict(made, self.plan(made, None), self.hardware)

    def drawn(self, cfg: Config, steps: int) -> Spread | None:
        """Predictions of the first steps of the data as a config draws them; None where each step has all
        samples that there are. Raises Refused."""
        made = self.blueprint(cfg)
        index = self._data(made)
        if len(index.samples) <= cfg.train.global_batch:
            return None
        return Spread([predict(made, plan, self.hardware) for plan in drawn_plans(made, index, steps)])

    def blueprint(self, cfg: Config) -> Blueprint:
        """The blueprint of a config. Raises Refused."""
        return draw_up(cfg, self.world, self._known)

    def plan(self, blueprint: Blueprint, candidate: Candidate | None) -> StepPlan:
        """The plan of the first step."""
        key: Any = None
        if candidate is not None:
            # What is dealt depends on no experts' degrees, and on stages only by the ranks that share data.
            places = tuple((m, c.block, c.degrees._replace(vpp=1, ep=1, etp=1)) for m, c in candidate.choices)
            key = places, candidate.microbatches
        if key is not None and key in self._plans:
            return replace(self._plans[key], inputs=blueprint.inputs)
        index = self._data(blueprint)

        def lookup(ids: Column) -> SampleTable:
            # What is known of samples follows from the model alone: one table of them serves all layouts.
            key = ids.tobytes()
            if key not in self._tables:
                self._tables[key] = SampleTable.of([index.samples[i] for i in ids.tolist()], blueprint.inputs)
            return self._tables[key]

        made = Batches.of(blueprint.cfg, index).plan(0, lookup, blueprint.inputs, index.skipped.keys())
        if key is not None:
            self._plans[key] = made
        return made

    def _data(self, blueprint: Blueprint) -> Index:
        """The data's index, or that of made-up samples; looked for once."""
        if self._index is None:
            data = virtual_data(blueprint)
            self._index, self.note = data.index, data.note
        return self._index
