"""A step in time and memory: priced counts, with which the schedule's own actions are simulated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

from mm.data.sample import Index
from mm.errors import Refused
from mm.plan.batches import Batches
from mm.plan.blueprint import Blueprint
from mm.plan.flops import step_flops
from mm.plan.step_plan import StepPlan
from mm.plan.table import SampleTable
from mm.predict.costs import Priced, priced, update_crowd, update_seconds
from mm.predict.count.job import count_job
from mm.predict.engine import as_megatron, megatron
from mm.predict.hardware import Hardware
from mm.predict.held import by_program, of_fullest
from mm.predict.paper import paper_flops
from mm.predict.spent import spent
from mm.predict.work import Counts
from parallel.schedule import simulate
from parallel.schedule.simulator.simulate import Timeline
from parallel.sequence.intervals import Column


@dataclass(frozen=True)
class Prediction:
    """What a step takes on hardware.

    breakdown: seconds of the mean rank by (module, what), which add up to step_s. boundary_s: of these, what
    it waits for rows of encoders and their gradients, or spends on sending them. bubble_fraction: the share
    of the step in which it has nothing to do. tflops_per_device: of forward and backward without what is
    computed again, over all ranks of the job. paper_tflops_per_device: by mm.predict.paper's metric, None for
    models that it is not of. memory: by a rank of each kind, bytes by kind; it adds up.
    timeline: of forwards and backwards; the update comes after it.
    """

    step_s: float
    tokens_per_s_per_device: float
    tflops_per_device: float
    paper_tflops_per_device: float | None
    memory: Mapping[int, Mapping[str, float]]
    bubble_fraction: float
    boundary_s: float
    breakdown: Mapping[tuple[str, str], float]
    timeline: Timeline

    @property
    def fullest(self) -> int:
        """The rank that holds most."""
        return max(self.memory, key=lambda rank: sum(self.memory[rank].values()))

    @property
    def memory_by_kind(self) -> Mapping[str, float]:
        """Of the rank that holds most."""
        return self.memory[self.fullest]

    @property
    def peak_memory_bytes(self) -> float:
        """Of the rank that holds most."""
        return sum(self.memory_by_kind.values())


def predict(blueprint: Blueprint, plan: StepPlan, hardware: Hardware) -> Prediction:
    """What a step takes, from the counts of its plan; see predict_counts(). Memory is exact on the rank that
    holds most, but for another engine's counts."""
    counts = count_job(blueprint, plan)
    if blueprint.cfg.run.engine == "megatron":
        engine = megatron()
        counts = as_megatron(blueprint, plan, counts, engine)
        hardware = replace(hardware, memory=replace(hardware.memory, reserved=engine.held.reserved))
        return predict_counts(blueprint, plan, counts, hardware)
    made = predict_counts(blueprint, plan, counts, hardware)
    exact = of_fullest(blueprint, plan, counts, made.memory, host=hardware.host is not None)
    return replace(made, memory=exact)


def predict_counts(blueprint: Blueprint, plan: StepPlan, counts: Counts, hardware: Hardware) -> Prediction:
    """What a step takes whose counts are given. Ranks at one place of the pipelines are simulated as one, so
    that a job of a thousand ranks takes as long as one of their programs.

    Raises Refused where the hardware lacks what the job needs: a dtype, links across nodes.
    """
    prices = priced(blueprint, plan, counts, hardware)
    line = simulate(blueprint.schedule(plan.active), prices.costs)
    update = {
        (m, what): s * update_crowd(blueprint, m, hardware)
        for (m, what), s in update_seconds(blueprint, counts, hardware).items()
    }
    step_s = line.seconds + sum(update.values())
    if not step_s:
        raise Refused("the step has no work, so nothing can be predicted of it")
    parts = {key: s for key, s in _mean(line, prices, blueprint.world).items() if s}
    for key, seconds in update.items():
        parts[key] = parts.get(key, 0.0) + seconds
    idle = sum(s for (_, what), s in parts.items() if what in ("bubble", "waiting"))
    flops, paper = sum(step_flops(blueprint, plan).values()), paper_flops(blueprint, plan)
    return Prediction(
        step_s=step_s,
        tokens_per_s_per_device=plan.tokens / step_s / blueprint.world,
        tflops_per_device=flops / step_s / blueprint.world / 1e12,
        paper_tflops_per_device=None if paper is None else paper / step_s / blueprint.world / 1e12,
        memory=by_program(line.plan, counts, hardware),
        bubble_fraction=idle / step_s,
        boundary_s=sum(s for (_, what), s in parts.items() if what == "boundary"),
        breakdown=parts,
        timeline=line,
    )


def _mean(line: Timeline, prices: Priced, world: int) -> dict[tuple[str, str], float]:
    """Seconds of forwards and backwards by (module, what), of the mean of all ranks of the job."""
    out: defaultdict[tuple[str, str], float] = defaultdict(float)
    for found, ranks in zip(spent(line, prices), line.plan.ranks_of, strict=True):
        for key, seconds in found.items():
            out[key] += seconds * len(ranks) / world
    out["", "bubble"] += line.seconds * (1 - len(line.plan.ranks) / world)  # ranks without a module
    return out


@dataclass(frozen=True)
class Spread:
    """Predictions of several steps of ragged data. mean_s, jitter_s: mean and deviation of their seconds."""

    steps: Sequence[Prediction]

    @property
    def mean_s(self) -> float:
        """Seconds."""
        return fmean(p.step_s for p in self.steps)

    @property
    def jitter_s(self) -> float:
        """Seconds."""
        return pstdev(p.step_s for p in self.steps)


def drawn_plans(blueprint: Blueprint, index: Index, steps: int) -> list[StepPlan]:
    """The plans of the first steps of a job over the data of an index, from its columns alone."""
    batches = Batches.of(blueprint.cfg, index)

    def lookup(ids: Column) -> SampleTable:
        return SampleTable.of([index.samples[i] for i in ids.tolist()], blueprint.inputs)

    bad = index.skipped.keys()
    return [batches.plan(step, lookup, blueprint.inputs, bad) for step in range(steps)]


def shortfall(prediction: Prediction, hardware: Hardware) -> str | None:
    """Why a step does not fit a device, with the numbers; None where it does. What the device holds beside
    tensors counts here, whatever the engine's own figure of a peak is."""
    kinds = {**prediction.memory_by_kind, "reserved": hardware.memory.reserved}
    needed, there = sum(kinds.values()), hardware.memory.bytes
    if needed <= there:
        return None
    parts = sorted(kinds.items(), key=lambda x: -x[1])
    shown = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in parts if size >= 5e7)
    return (
        f"needs {needed / 1e9:.1f} GB on rank {prediction.fullest} ({shown}); {hardware.name} has "
        f"{there / 1e9:.1f} GB a device"
    )


def check_room(states: float, devices: int, hardware: Hardware) -> None:
    """Raise Refused where no layout at all fits. states: bytes that the weights, their gradients and the
    optimizer take over all devices together, each once."""
    room = hardware.memory.bytes - hardware.memory.reserved
    if states <= room * devices:
        return
    least = -int(-states // room)
    raise Refused(
        f"weights, gradients and optimizer need {states / 1e9:.1f} GB; {devices} {hardware.name} have "
        f"{room * devices / 1e9:.1f} GB, {room / 1e9:.1f} each; needed: at least {least} of them"
    )
