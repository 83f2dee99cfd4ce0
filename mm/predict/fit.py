"""What an operation, a message and a byte cost on this machine, fitted on timed reference jobs.

Processor seconds of all ranks are nearly linear in these costs. Of the memory bandwidth several are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.costs import processor_seconds_of
from mm.predict.count.job import count_job
from mm.predict.hardware import Hardware
from mm.predict.step import predict_counts
from mm.predict.work import Counts

BANDWIDTHS = tuple(1e9 * 2 ** (k / 2) for k in range(13))  # bytes/s, 1 to 64 GB/s
USUAL = (2e-5, 5e-4, 5e-4, 5e-3)  # seconds of what with_costs() takes, from which the fit starts
Job = tuple[Blueprint, StepPlan, Counts]


def with_costs(hardware: Hardware, bandwidth: float, costs: np.ndarray) -> Hardware:
    """costs: seconds of a launch, a collective, a unit's gather or sum, and of a step."""
    assert hardware.host is not None
    launch, collective, unit, step = (float(x) for x in costs)
    return replace(
        hardware,
        memory=replace(hardware.memory, bandwidth=bandwidth),
        kernels=replace(hardware.kernels, launch_s=launch),
        host=replace(hardware.host, collective_s=collective, unit_s=unit, step_s=step),
    )


def jobs_of(given: Sequence[tuple[Blueprint, StepPlan]]) -> list[Job]:
    """With their counts."""
    return [(blueprint, plan, count_job(blueprint, plan)) for blueprint, plan in given]


def fitted(hardware: Hardware, jobs: Sequence[Job], processor: Sequence[float]) -> Hardware:
    """The hardware with the costs that come nearest to the measured processor seconds, relative to these."""
    target, best = np.asarray(processor), (float("inf"), hardware)
    for bandwidth in BANDWIDTHS:
        found = np.asarray(USUAL)
        for _ in range(2):
            base = _seconds(with_costs(hardware, bandwidth, found), jobs)
            more = [found + np.eye(4)[k] * USUAL[k] for k in range(4)]
            slopes = [
                (_seconds(with_costs(hardware, bandwidth, x), jobs) - base) / USUAL[k]
                for k, x in enumerate(more)
            ]
            a = np.stack(slopes, 1)
            found = non_negative(a / target[:, None], (target - base + a @ found) / target)
        made = with_costs(hardware, bandwidth, found)
        error = float(np.square(_seconds(made, jobs) / target - 1).sum())
        best = min(best, (error, made), key=lambda x: x[0])
    return best[1]


def _seconds(hardware: Hardware, jobs: Sequence[Job]) -> np.ndarray:
    return np.asarray([processor_seconds_of(*job, hardware) for job in jobs])


def non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 for which a x is nearest to b; a [rows, few]. Which are 0 is tried, for few of them."""
    scale = np.abs(a).max(axis=0)
    scale[scale == 0] = 1.0
    best, error = np.zeros(a.shape[1]), float(np.square(b).sum())
    for kept in range(1, 2 ** a.shape[1]):
        some = [k for k in range(a.shape[1]) if kept >> k & 1]
        x = np.zeros(a.shape[1])
        x[some] = np.linalg.lstsq(a[:, some] / scale[some], b, rcond=None)[0]
        left = float(np.square(b - a @ (x / scale)).sum())
        if (x >= 0).all() and left < error:
            best, error = x, left
    found: np.ndarray = best / scale
    return found


def with_cores(hardware: Hardware, jobs: Sequence[Job], wall: Sequence[float]) -> Hardware:
    """The hardware with as many cores as the measured steps show: fewer than there are, where ranks wait for
    messages, or other programs take some."""
    assert hardware.host is not None
    cores = hardware.host.cores
    simulated = [predict_counts(*job, hardware).step_s for job in jobs]
    share = median(s / w for s, w in zip(simulated, wall, strict=True))
    return replace(hardware, host=replace(hardware.host, cores=min(cores, cores * share)))
