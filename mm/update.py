"""The end of a step: agree on the loss and the gradient norm, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from llm.model import LLM
from mm.blueprint import SINK
from mm.config import TrainConfig
from mm.errors import NonFinite
from mm.job import Job
from mm.memory import peak_memory
from mm.step import StepResult
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

    objectives: sums over tokens, unweighted, of what is learned beside the next token.
    """

    loss: float
    grad_norm: float
    grad_norm_by_module: Mapping[str, float]
    boundary: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    objectives: Mapping[str, float]
    stop: bool


def finish_step(job: Job, result: StepResult, step: int, lr: float, *, stop: bool = False) -> Update:
    """Agree on loss and gradient norm in one message, then clip and update, or stop on all ranks alike.

    stop: this rank was asked to end; any rank's wish ends the run on all of them.
    Raises NonFinite, before anything is updated, naming module and rank.
    """
    modules = job.blueprint.modules
    edges = list(job.blueprint.inputs.encoders)
    start = time.perf_counter()
    squares = {}
    for m in modules:
        if m in job.optimizers:
            job.optimizers[m].collect()
            squares[m] = job.optimizers[m].norm_squared()
    sync = time.perf_counter() - start
    computed = {
        m: sum(t for (k, of), t in result.seconds.items() if of == m and k in COMPUTE) for m in modules
    }
    mine = {"loss": result.loss, "sync": sync, "memory": float(peak_memory(job.rank.device))}
    mine |= {"stop": float(stop), **{m: squares.get(m, 0.0) for m in modules}}
    mine |= {f"{m} computes": computed[m] for m in modules}
    for m in edges:
        stats = [boundary.stats for boundary in job.boundaries.get(m, ())]
        mine[f"{m} bytes"] = float(sum(sum(s.bytes_received.values()) for s in stats))
        mine[f"{m} seconds"] = sum(sum(s.seconds.values()) for s in stats)
    mine |= {f"{name} objective": value for name, value in _objectives(job).items()}
    table = job.control.gather(list(mine.values()))
    column = dict(zip(mine, table.T, strict=True))
    _check_finite(column, modules, step)
    total = {m: math.sqrt(float(column[m].sum())) for m in modules}
    norm = math.sqrt(sum(n * n for n in total.values()))
    clip = job.blueprint.cfg.train.clip
    factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
    start = time.perf_counter()
    for optimizer in job.optimizers.values():
        optimizer.scale(factor)
        optimizer.step(lr)
    _update_expert_bias(job)
    seconds = {m: float(column[f"{m} computes"].max()) for m in modules}
    seconds["optimizer"] = float(column["sync"].max()) + time.perf_counter() - start
    boundary = {
        m: {"bytes": int(column[f"{m} bytes"].sum()), "seconds": float(column[f"{m} seconds"].max())}
        for m in edges
    }
    return Update(
        loss=float(column["loss"].sum()),
        grad_norm=norm,
        grad_norm_by_module=total,
        boundary=boundary,
        seconds=seconds,
        peak_memory_bytes=int(column["memory"].max()),
        objectives={o: float(column[f"{o} objective"].sum()) for o in job.blueprint.objectives},
        stop=bool(column["stop"].any()),
    )


def _objectives(job: Job) -> dict[str, float]:
    """This rank's sums over tokens of what the language model learns beside the next token."""
    out = dict.fromkeys(job.blueprint.objectives, 0.0)
    if not out or SINK not in job.parts:
        return out
    first = job.blueprint.layouts[SINK].coord(job.rank.rank).tp == 0
    for part in job.parts[SINK].values():
        assert isinstance(part, LLM)
        for name, value in part.take_objectives().items():
            if name in out and (first or name != "mtp"):  # of further tokens, tp ranks have equal sums
                out[name] += float(value)
    return out


def _check_finite(column: Mapping[str, np.ndarray], modules: list[str], step: int) -> None:
    for name in ["loss", *modules]:
        bad = np.flatnonzero(~np.isfinite(column[name]))
        if len(bad):
            what = f"loss of module {SINK}" if name == "loss" else f"gradient of module {name}"
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
