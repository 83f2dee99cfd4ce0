"""Metrics of one training step, as metrics.jsonl has them (docs/config.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mm.plan.drawn import Count
from mm.plan.step_plan import Imbalance
from mm.plan.subsets import SubsetLoss
from mm.train.stragglers import Slowest


@dataclass(frozen=True)
class BoundaryMetrics:
    """The boundary of one encoder in a step, both directions together."""

    bytes: int  # payload received from other ranks, summed over ranks
    seconds: float  # of the slowest rank


@dataclass(frozen=True)
class GradientStatistics:
    """Of a layer's gradients, before clipping."""

    norm: float
    max: float  # largest absolute element


@dataclass(frozen=True)
class OutputStatistics:
    """Of the elements of a layer's outputs in a step."""

    elements: int  # of all tokens, or rows
    mean: float
    rms: float  # square root of the mean square
    max: float  # largest absolute element


@dataclass(frozen=True)
class LayerStatistics:
    """Of a layer, or of a part of a module beside its layers.

    kind: see mm.plan.places.Place. gradient: None where nothing is trained. output: None where nothing came
    through, and of what is no layer.
    """

    kind: str
    gradient: GradientStatistics | None
    output: OutputStatistics | None


@dataclass(frozen=True)
class StepMetrics:
    """One step's metrics, equal on all ranks but for data_s. Fields are written in this order, but `stop`."""

    step: int  # from 1
    loss: float  # nats a supervised token
    tokens: int  # of all samples, without padding
    lr: float
    grad_norm: float  # before clipping
    grad_norm_by_module: Mapping[str, float]
    flops_by_module: Mapping[str, float]  # forward and backward, over all ranks
    peak_memory_bytes: int  # of the rank with most
    data_s: float  # waited for data on this rank
    seconds_by_module: Mapping[str, float]  # host seconds of the slowest rank's forwards and backwards
    waited_s_by_module: Mapping[str, list[float]]  # by rank, for inputs; up to 64 ranks
    slowest_rank: Slowest | None  # the one that computed longest
    optimizer_s: float  # gradients' sums and update
    boundary: Mapping[str, BoundaryMetrics]  # by encoder
    objectives: Mapping[str, float]  # unweighted, without the next token's loss
    loss_by_modality: Mapping[str, SubsetLoss]  # of samples with items of these modules: vision+audio; text
    loss_by_source: Mapping[str, SubsetLoss]  # by data set (mm/data/sources.py)
    drawn_by_source: Mapping[str, Count]  # by data set, samples and tokens taken so far
    imbalance: Mapping[str, Imbalance]  # by module, means over the micro-batches in which it has work
    skipped_items: int
    stop: bool  # a rank was asked to end
    layers: Mapping[str, Mapping[str, LayerStatistics]] = field(default_factory=dict)
    """By module and place, at the steps that train.statistics asks for; else empty."""
    batch: int | None = None
    """The number of its batch, from 1, where batches were left out before it."""
    left_out: str = ""
    """Why nothing was updated, in a step that is not finite."""
    saving: float = 0.0
    """How far writers of a checkpoint are: the largest Saver.status() of all ranks."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: every field but `stop` and `saving`; layers, batch and left_out where they say
        something. In a step that was left out, null is for what is not finite: JSON has no word for it."""
        out = asdict(self)
        del out["stop"], out["saving"]
        for key in ("layers", "batch", "left_out"):
            if not out[key]:
                del out[key]
        for key in ("loss_by_modality", "loss_by_source", "drawn_by_source"):
            out[key] = {name: found._asdict() for name, found in out[key].items()}
        return _with_nulls(out) if self.left_out else out


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TimedStep:
    """A step's metrics and its wall time. devices: ranks that host a module."""

    metrics: StepMetrics
    step_s: float
    devices: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all samples a second of wall time."""
        return self.metrics.tokens / self.step_s

    @property
    def tflops_per_device(self) -> float:
        """1e12 floating point operations a second and device."""
        return sum(self.metrics.flops_by_module.values()) / self.step_s / self.devices / 1e12

    def to_json(self) -> dict[str, Any]:
        """The step's line of metrics.jsonl as plain data."""
        return {
            **self.metrics.to_json(),
            "step_s": self.step_s,
            "tokens_per_s": self.tokens_per_s,
            "tflops_per_device": self.tflops_per_device,
        }
