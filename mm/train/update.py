"""The end of a step: agree on the loss and the gradient norm, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llm.model import LLM
from mm.config.schema import TrainConfig
from mm.errors import NonFinite
from mm.plan.blueprint import SINK
from mm.ranks.job import Job
from mm.ranks.memory import peak_memory
from mm.train.rank_report import Report, over_ranks
from mm.train.step import StepResult
from parallel.schedule.action import COMPUTE


def learning_rate(train: TrainConfig, step: int) -> float:
    """Warm-up, stable, decay (WSD, arXiv 2404.06395): linear up, constant, linear down to min_lr.

    step counts from 0; warmup and decay are fractions of train.steps.
    """
    warmup = round(train.warmup * train.steps)
    decay = round(train.decay * train.steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    left = train.steps - step
    if left <= decay:
        return train.min_lr + (train.lr - train.min_lr) * left / (decay + 1)
    return train.lr


@dataclass(frozen=True)
class Update:
    """What all ranks know after a step: sums over ranks, equal everywhere.

    compute_s: of the slowest rank, by module; optimizer_s: gradients' sums and update. objectives:
    unweighted, as LLM.take_objectives has them.
    """

    loss: float
    grad_norm: float
    grad_norm_by_module: Mapping[str, float]
    boundary: Mapping[str, Mapping[str, float]]
    compute_s: Mapping[str, float]
    optimizer_s: float
    peak_memory_bytes: int
    objectives: Mapping[str, float]
    stop: bool


def finish_step(job: Job, result: StepResult, step: int, lr: float, *, stop: bool = False) -> Update:
    """Agree on loss and gradient norm in one message, then clip and update, or stop on all ranks alike.

    stop: this rank was asked to end; any rank's wish ends the run on all of them.
    Raises NonFinite, before anything is updated, naming module and rank.
    """
    start = time.perf_counter()
    squares = dict.fromkeys(job.blueprint.modules, 0.0)
    for m, optimizer in job.optimizers.items():
        optimizer.collect()
        squares[m] = optimizer.norm_squared()
    mine = _report(job, result, squares, time.perf_counter() - start, stop)
    ranks = [mine.read(row) for row in job.control.gather(mine.numbers())]
    _check_finite(ranks, step)
    total = {m: math.sqrt(n) for m, n in over_ranks(sum, [r.squares for r in ranks]).items()}
    norm = math.sqrt(sum(n * n for n in total.values()))
    clip = job.blueprint.cfg.train.clip
    factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
    start = time.perf_counter()
    for optimizer in job.optimizers.values():
        optimizer.scale(factor)
        optimizer.step(lr)
    _update_expert_bias(job)
    edge_bytes = over_ranks(sum, [r.edge_bytes for r in ranks])
    edge_s = over_ranks(max, [r.edge_s for r in ranks])
    return Update(
        loss=sum(r.loss for r in ranks),
        grad_norm=norm,
        grad_norm_by_module=total,
        boundary={m: {"bytes": int(edge_bytes[m]), "seconds": edge_s[m]} for m in edge_bytes},
        compute_s=over_ranks(max, [r.compute_s for r in ranks]),
        optimizer_s=max(r.sync_s for r in ranks) + time.perf_counter() - start,
        peak_memory_bytes=int(max(r.memory_bytes for r in ranks)),
        objectives=over_ranks(sum, [r.objectives for r in ranks]),
        stop=any(r.stop for r in ranks),
    )


def _report(job: Job, result: StepResult, squares: Mapping[str, float], sync_s: float, stop: bool) -> Report:
    """What this rank has to say of the step."""
    compute_s = dict.fromkeys(job.blueprint.modules, 0.0)
    for (kind, module), seconds in result.seconds.items():
        compute_s[module] += seconds if kind in COMPUTE else 0.0
    edges = list(job.blueprint.inputs.encoders)
    stats = {m: [b.stats for e, both in job.boundaries.items() if e.source == m for b in both] for m in edges}
    return Report(
        loss=result.loss,
        sync_s=sync_s,
        memory_bytes=float(peak_memory(job.rank.device)),
        stop=float(stop),
        squares=squares,
        compute_s=compute_s,
        edge_bytes={m: float(sum(sum(s.bytes_received.values()) for s in stats[m])) for m in edges},
        edge_s={m: float(sum(sum(s.seconds.values()) for s in stats[m])) for m in edges},
        objectives=_objectives(job),
    )


def _objectives(job: Job) -> dict[str, float]:
    """This rank's parts of what the language model learns beside the next token."""
    out = dict.fromkeys(job.blueprint.objectives, 0.0)
    if not out or SINK not in job.parts:
        return out
    first = job.blueprint.layouts[SINK].coord(job.rank.rank).tp == 0
    for part in job.parts[SINK].values():
        assert isinstance(part, LLM)
        for name, value in part.take_objectives().items():
            if name in out and (first or name != "mtp"):  # "mtp": equal on all tp ranks
                out[name] += float(value)
    return out


def _check_finite(ranks: Sequence[Report], step: int) -> None:
    _refuse_infinite([r.loss for r in ranks], f"loss of module {SINK}", step)
    for m in ranks[0].squares:
        _refuse_infinite([r.squares[m] for r in ranks], f"gradient of module {m}", step)


def _refuse_infinite(values: Sequence[float], what: str, step: int) -> None:
    """Raise NonFinite naming the ranks whose value of `what` is not finite."""
    bad = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise NonFinite(
            f"step {step + 1}: the {what} is not finite on rank {', '.join(map(str, bad))}; nothing was "
            "updated. Lower train.lr, or resume from the last checkpoint with another data order"
        )


def _update_expert_bias(job: Job) -> None:
    """Shift routing towards experts that got fewer tokens in this global batch."""
    if SINK not in job.parts or job.blueprint.llm.freeze:
        return
    layers = [m for part in job.parts[SINK].values() if isinstance(part, LLM) for m in part.moe_layers()]
    if layers:
        load = torch.stack([m.load for m in layers])
        dist.all_reduce(load, group=job.meshes[SINK].stage)
        for layer, counts in zip(layers, load, strict=True):
            layer.update_bias(counts)
