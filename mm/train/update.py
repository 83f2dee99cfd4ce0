"""The end of a step: agree on the loss and the gradient norm, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from llm.model import LLM
from llm.moe import MoE
from mm.config.outline import SINK
from mm.config.training import TrainConfig
from mm.errors import NonFinite
from mm.plan.subsets import Subset
from mm.ranks.job import Job
from mm.ranks.memory import peak_memory
from mm.train.blame import Findings, of_sums, origin
from mm.train.guard import Guard
from mm.train.metrics import BoundaryMetrics, LayerStatistics
from mm.train.parts import find_parts
from mm.train.rank_report import EdgeReport, ModuleReport, Own, Report, Scalars
from mm.train.statistics import layer_statistics
from mm.train.step import StepResult
from mm.train.stragglers import Slowest, listed, slowest
from mm.train.weights import refresh_held
from parallel.schedule.action import COMPUTE


def learning_rate(train: TrainConfig, step: int) -> float:
    """Warm-up, stable, decay (WSD, arXiv 2404.06395): linear up, constant, then down to min_lr.

    step counts from 0; warmup and decay are fractions of train.steps. The decay is linear, a cosine (arXiv
    1608.03983), or 1 - sqrt (arXiv 2405.18392, section 4.1).
    """
    warmup = round(train.warmup * train.steps)
    decay = round(train.decay * train.steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    left = train.steps - step
    if left <= decay:
        done = 1 - left / (decay + 1)
        shapes = {
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "sqrt": 1 - math.sqrt(done),
        }
        return train.min_lr + (train.lr - train.min_lr) * shapes[train.decay_shape]
    return train.lr


@dataclass(frozen=True)
class Update:
    """What all ranks know after a step, equal everywhere.

    losses: by subset of the samples; they add up to the loss. grad_norm: before clipping. compute_s: of the
    slowest rank, by module; waited_s: by module and rank. optimizer_s: seconds of the gradients' sums and the
    update. objectives: unweighted, as LLM.take_objectives gives them. stop: some rank was asked to end.
    notices: what each rank says of the step to come, [world, n]. layers: statistics by module and place,
    where they were asked. left_out: why nothing was updated, "" where it was; loss and norms are then not all
    finite.
    """

    losses: dict[Subset, float]
    grad_norm: float
    grad_norm_by_module: dict[str, float]
    boundary: dict[str, BoundaryMetrics]
    compute_s: dict[str, float]
    waited_s: dict[str, list[float]]
    slowest: Slowest | None
    optimizer_s: float
    peak_memory_bytes: int
    objectives: dict[str, float]
    stop: bool
    notices: np.ndarray
    layers: dict[str, dict[str, LayerStatistics]]
    left_out: str = ""

    @property
    def loss(self) -> float:
        """In nats a supervised token."""
        return float(sum(self.losses.values()))


def finish_step(
    job: Job,
    result: StepResult,
    step: int,
    lr: float,
    *,
    stop: bool = False,
    notice: Sequence[float] = (),
    guard: Guard | None = None,
) -> Update:
    """Agree on loss and gradient norm in one message, then clip and update.

    stop: this rank was asked to end; the run then ends on all ranks. notice: what it says of the next step.
    guard: says whether a step that is not finite is left out; None: it is not.
    Raises NonFinite on all ranks, before anything is updated, naming the module and the rank that gave a
    number that is not finite first.
    """
    start = time.perf_counter()
    squares: dict[str, Own] = dict.fromkeys(job.blueprint.modules, 0.0)
    for m, optimizer in job.optimizers.items():
        optimizer.collect()
        squares[m] = optimizer.norm_squared()
    mine = _report(job, result, squares, time.perf_counter() - start, stop)
    # The one time that a step's host waits for its device.
    table = job.control.gather([*mine.numbers(), *notice])
    reports, notices = np.split(table, [table.shape[1] - len(notice)], axis=1)
    ranks = mine.read(reports)
    total = {m: math.sqrt(x.squares.sum()) for m, x in ranks.modules.items()}
    norm = math.sqrt(sum(n * n for n in total.values()))
    start = time.perf_counter()
    left_out = ""
    if math.isfinite(norm + sum(float(shares.sum()) for shares in ranks.losses.values())):
        _apply(job, norm, lr)
    else:
        left_out = _why(job, result, step, guard)
        _discard(job)
    return Update(
        losses={name: float(shares.sum()) for name, shares in ranks.losses.items()},
        grad_norm=norm,
        grad_norm_by_module=total,
        boundary={
            m: BoundaryMetrics(int(x.received_bytes.sum()), float(x.seconds.max()))
            for m, x in ranks.edges.items()
        },
        compute_s={m: float(x.compute_s.max()) for m, x in ranks.modules.items()},
        waited_s=listed({m: x.waited_s for m, x in ranks.modules.items()}),
        slowest=slowest({m: x.compute_s - x.waited_s for m, x in ranks.modules.items()}),
        optimizer_s=float(ranks.scalars.sync_s.max()) + time.perf_counter() - start,
        peak_memory_bytes=int(ranks.scalars.memory_bytes.max()),
        objectives={name: float(sums.sum()) for name, sums in ranks.objectives.items()},
        stop=bool(ranks.scalars.stop.any()),
        notices=notices,
        layers={} if left_out else layer_statistics(job, ranks.layers),
        left_out=left_out,
    )


def _apply(job: Job, norm: float, lr: float) -> None:
    clip = job.blueprint.cfg.train.clip
    factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
    for optimizer in job.optimizers.values():
        optimizer.scale(factor)
        optimizer.step(lr)
    refresh_held(job)
    _update_expert_bias(job)


def _discard(job: Job) -> None:
    """Drop what the step has left, so that nothing of it enters a later one."""
    for optimizer in job.optimizers.values():
        optimizer.discard()
    for layer in _moe_layers(job):
        layer.load.zero_()


def _report(
    job: Job, result: StepResult, squares: Mapping[str, Own], sync_s: float, stop: bool
) -> Report[Own]:
    """This rank's report of the step."""
    compute_s = dict.fromkeys(job.blueprint.modules, 0.0)
    for (kind, module), seconds in result.seconds.items():
        compute_s[module] += seconds if kind in COMPUTE else 0.0
    return Report(
        scalars=Scalars(
            sync_s=sync_s,
            memory_bytes=float(peak_memory(job.rank.device)),
            stop=float(stop),
        ),
        losses=dict(zip(result.subsets.names, result.losses.unbind(), strict=True)),
        modules={
            m: ModuleReport[Own](squares[m], compute_s[m], result.waited.get(m, 0.0))
            for m in job.blueprint.modules
        },
        edges={m: _edge_report(job, m) for m in job.blueprint.inputs.encoders},
        objectives=_objectives(job),
        layers={} if result.watch is None else result.watch.report(),
    )


def _edge_report(job: Job, module: str) -> EdgeReport[Own]:
    """What this rank has received from and for an encoder, over all stages that its rows enter."""
    stats = [b.stats for edge, both in job.boundaries.items() if edge.source == module for b in both]
    received = float(sum(sum(s.bytes_received.values()) for s in stats))
    return EdgeReport(received, float(sum(sum(s.seconds.values()) for s in stats)))


def _objectives(job: Job) -> dict[str, Own]:
    """This rank's sums of the language model's objectives beside the next token's loss."""
    out: dict[str, Own] = dict.fromkeys(job.blueprint.objectives, 0.0)
    if not out or SINK not in job.parts:
        return out
    first = job.blueprint.layouts[SINK].coord(job.rank.rank).tp == 0
    for part in job.parts[SINK].values():
        assert isinstance(part, LLM)
        for name, value in part.take_objectives().items():
            if name in out and (first or name != "mtp"):  # "mtp": equal on all tp ranks
                out[name] = out[name] + value
    return out


def _why(job: Job, result: StepResult, step: int, guard: Guard | None) -> str:
    """Why a step is left out, in words; every rank calls this. Raises NonFinite where it is not left out."""
    assert result.trail is not None
    found = [Findings.read(text) for text in job.control.tell(result.trail.findings(job).written())]
    what = f"step {step + 1}: {origin(found)}"
    if of_sums(found):
        what += find_parts(job, result.trail.prepared)
        _objectives(job)  # those of the second run do not count
    damaged = any(one.weights for one in found)  # then every step is like this one
    if not damaged and guard is not None and guard.leaves_out(step):
        return what
    said = "; nothing was updated"
    if damaged:
        raise NonFinite(
            f"{what}{said}. A resume goes on from the newest checkpoint whose weights are finite; lower "
            "train.lr, or leave out the batches that lead here (data.skip)"
        )
    rule = job.blueprint.cfg.train
    many = f", the last of more than train.max_nonfinite={rule.max_nonfinite} such steps of 1,000"
    batch = step if guard is None else guard.skips.batch(step)
    spent = many if rule.nonfinite == "skip" else ", or train.nonfinite=skip for all such steps"
    raise NonFinite(
        f"{what}{said}. Resume from the last checkpoint without this batch: data.skip=[{batch + 1}]"
        f"{spent}; or lower train.lr"
    )


def _moe_layers(job: Job) -> list[MoE]:
    parts = job.parts.get(SINK, {}).values()
    return [layer for part in parts if isinstance(part, LLM) for layer in part.moe_layers()]


def _update_expert_bias(job: Job) -> None:
    """Shift routing towards experts that got fewer tokens in this global batch."""
    layers = _moe_layers(job)
    if layers and not job.blueprint.llm.freeze:
        load = torch.stack([m.load for m in layers])
        if job.meshes[SINK].stage is not None:
            dist.all_reduce(load, group=job.meshes[SINK].stage)
        for layer, counts in zip(layers, load, strict=True):
            layer.update_bias(counts)
