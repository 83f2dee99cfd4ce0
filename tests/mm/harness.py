"""Runs a few training steps of a small trimodal job, as one of the ranks of a pool."""

from __future__ import annotations

import copy
import io
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from mm import cli
from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.data.sample import Index
from mm.data.tokenizer import Tokenizer
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.pieces import with_pieces
from mm.plan.select import select
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.ranks.stop import REQUESTS
from mm.train.one_step import open_feed, train_step
from parallel.sharding.param import declared, local
from parallel.sharding.shard import held_indices

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SMALL: dict[str, Any] = {
    "run": {"seed": 1, "timeout_s": 30.0},
    "model": {
        "vision": {
            "encoder": "vit",
            "projector": {"hidden": 24},
            "options": {"width": 24, "heads": 12, "layers": 2, "mlp": 48, "max_grid": 8},
        },
        "audio": {
            "encoder": "fastconformer",
            "projector": {"hidden": 24},
            "options": {"mels": 16, "channels": 4, "width": 24, "heads": 12, "layers": 2, "ffn": 48},
        },
        "llm": {
            "pattern": "ME*-",
            "d_model": 24,
            "n_heads": 4,
            "n_kv_heads": 4,
            "head_dim": 6,
            "mamba_heads": 8,
            "mamba_head_dim": 6,
            "mamba_state": 5,
            "mamba_groups": 4,
            "chunk": 16,
            "n_experts": 8,
            "top_k": 2,
            "expert_ffn": 12,
            "shared_ffn": 24,
            "mlp_ffn": 48,
            "loss_chunk": 50,
            "init_std": 0.2,
        },
    },
    "data": {"train": ["data/digits-train-*.tar"], "context": 96},
    "train": {"steps": 3, "global_batch": 12, "dtype": "float64", "lr": 1e-2, "clip": 0.5},
}


def small(**sections: Any) -> dict[str, Any]:
    """The small config with sections merged in: small(train={"dtype": "float32"}, layout={..})."""
    raw = copy.deepcopy(SMALL)
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


@cache
def _digits() -> Index:
    """The index of the small config's data, read once a process: jobs are many and it is a sixth of one."""
    return load_index(SMALL["data"]["train"], CONFIGS)


def _index(blueprint: Blueprint) -> Index:
    rules = blueprint.cfg.data
    if rules.train == SMALL["data"]["train"]:
        return select(with_pieces(_digits(), blueprint.inputs, Tokenizer()), blueprint.inputs, rules)
    return open_index(blueprint, rules.train, CONFIGS)


@contextmanager
def running(raw: dict[str, Any]) -> Iterator[tuple[Job, Feed]]:
    """The job of a config on this rank, and its steps; closed at the end."""
    world = dist.get_world_size()
    blueprint = draw_up(from_mapping(raw, CONFIGS), world)
    rank = RankInfo(dist.get_rank(), world, torch.device("cpu"), node_size=blueprint.node_size)
    index = _index(blueprint)
    job = build_job(blueprint, rank)
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        yield job, feed
    finally:
        feed.close()
        data.assembler.reader.close()
        job.close()


def train_few(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Metrics of the first steps; the same on every rank."""
    with running(raw) as (job, feed):
        return [asdict(train_step(job, feed, step)) for step in range(steps)]


Held = dict[str, tuple[list[np.ndarray], np.ndarray]]


def train_and_weigh(raw: dict[str, Any], steps: int) -> tuple[list[dict[str, Any]], Held]:
    """Metrics as of train_few, and what this rank then holds (weigh)."""
    with running(raw) as (job, feed):
        metrics = [asdict(train_step(job, feed, step)) for step in range(steps)]
        return metrics, weigh(job)


def weigh(job: Job) -> Held:
    """What this rank holds of weights and buffers: by full name (global indices of each dim, values)."""
    held: Held = {}
    for module, parts in job.parts.items():
        for part in parts.values():
            kept = part.state_dict()
            for name, param, spec in declared(part):
                index = held_indices(tuple(param.shape), spec, job.meshes[module])
                value = local(kept.pop(name)).numpy().copy()
                held[f"{module}.{name}"] = [i.numpy() for i in index], value
            for name, buffer in kept.items():  # alike on all ranks
                held[f"{module}.{name}"] = [np.arange(n) for n in buffer.shape], buffer.numpy().copy()
    return held


class Ended(NamedTuple):
    """How a rank of a job ended: its exit code and its output."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_job(argv: list[str], port: int, rank: int = 0, world: int = 1) -> Ended:
    """`python -m mm ARGUMENTS` as one of the ranks that a launcher would start, in this process."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    out, err = io.StringIO(), io.StringIO()
    # A rank is about to end when it leaves a handler or a mask of its own behind; this process is not.
    heard = [(s, signal.getsignal(s)) for s in REQUESTS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        environment = mock.patch.dict(os.environ, {k: str(v) for k, v in place.items()})
        with environment, redirect_stdout(out), redirect_stderr(err):
            code = cli.main(argv)
    finally:
        for number, handler in heard:
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Ended(code, out.getvalue(), err.getvalue())


def run_rank(argv: list[str], port: int) -> Ended:
    """run_job on a rank of the pool, whose default group makes room for the job's own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    return run_job(argv, port, rank, world)


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Largest relative difference of losses, by subset too, of other objectives and of per-module gradient
    norms; infinite where subsets do not add up to the loss."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        pairs = [(a["loss"], b["loss"])]
        pairs += [
            (a["grad_norm_by_module"][m], b["grad_norm_by_module"][m]) for m in b["grad_norm_by_module"]
        ]
        pairs += [(a["objectives"][k], b["objectives"][k]) for k in b["objectives"]]
        for key in ("loss_by_modality", "loss_by_source"):
            (names, found), (others, given) = (zip(*x[key].items(), strict=True) for x in (a, b))
            assert names == others and [n for _, n in found] == [n for _, n in given]
            pairs += [(mine[0], other[0]) for mine, other in zip(found, given, strict=True)]
            whole = sum(loss * n for loss, n in found) / sum(n for _, n in found)
            worst = max(worst, np.inf if abs(whole - a["loss"]) > 1e-12 * abs(a["loss"]) else 0.0)
        worst = max([worst, *(abs(x - y) / max(abs(y), 1e-300) for x, y in pairs)])
    return worst
