"""What a comparison of layouts has found, as plain data: asdict() of it is its JSON. Needs no torch.

Seconds are of wall time and bytes are payload, unless something else is said. Shares are of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

WATCHED = 2  # steps after the timed ones of a round: one for times, and in the first round one for memory
MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "other")
SpeedupVerdict = Literal["baseline", "faster", "slower", "within noise", "too few steps"]
Limit = Literal["computing", "uneven", "pipeline", "cores", "exchanging", "messages", "updating", "data"]


class Interval(NamedTuple):
    """A 95 % confidence interval of a speed-up."""

    low: float
    high: float


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of the timed steps of a layout."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Edge:
    """The boundary between an encoder and the language model, both directions, medians of the timed steps.

    bytes: payload received from other ranks, summed over ranks. seconds: that the rank which waited longest
    spent there, its copies included.
    """

    bytes: float
    seconds: float


@dataclass(frozen=True)
class Placed:
    """Where a module is. degrees: tp, cp, dp, pp, vpp, ep, etp, edp. ranks: in the order of the layout.

    places: for each of `ranks`, its coordinates tp, cp, dp and pp.
    """

    degrees: Mapping[str, int]
    ranks: list[int]
    places: list[Mapping[str, int]]
    sequence_parallel: bool
    data_parallel: str


@dataclass(frozen=True)
class ActionSeconds:
    """All actions of one kind that a rank did for a module in a step.

    kind: a value of parallel.schedule.Kind, such as forward. seconds: from start to end of each. waited: of
    them, until inputs from another module or stage had come. processor: of them, that the rank's thread
    computed; queued: that it could have and waited for a core. The rest is in exchanges within the module.
    Both are None on an accelerator; queued is 0 where the system does not count it.
    """

    module: str
    kind: str
    seconds: float
    waited: float
    processor: float | None
    queued: float | None = None


@dataclass(frozen=True)
class RankResult:
    """One rank in one observed step, and its memory at the peak of another.

    hosts: its modules, with pipeline ranks. data_s: waited for data. update_s: gradient sums and the update.
    step_s: of the whole step on this rank. bubble: share of the schedule's time in which the rank did not
    compute. idle: share of the whole step in which its thread did not, exchanges included; None on an
    accelerator. memory: by MEMORY_KINDS.
    """

    rank: int
    hosts: str
    actions: list[ActionSeconds]
    data_s: float
    update_s: float
    step_s: float
    bubble: float
    idle: float | None
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Bar:
    """A computation on a row of a timeline. start, end: seconds from the start of the step.

    chunk: which of the rank's virtual stages. half: of the row: 1 the upper, 2 the lower, 0 all of it.
    """

    row: int
    start: float
    end: float
    kind: str
    module: str
    stage: int
    microbatch: int
    span: int
    chunk: int
    half: int


@dataclass(frozen=True)
class Arrow:
    """What a computation of one row needed of another row. sent: when, in seconds from the start.

    bar: the index in Timeline.bars of that computation, on the row `target`.
    """

    kind: str
    module: str
    source: int
    target: int
    sent: float
    bar: int


@dataclass(frozen=True)
class Timeline:
    """Forward and backward of one step as they ran, a row for each rank of `ranks`. step: its number, from 1.

    seconds: from the first action of all to the last. schedule: its kind. modules: in the order of colours.
    """

    step: int
    seconds: float
    schedule: str
    modules: list[str]
    ranks: list[int]
    bars: list[Bar]
    arrows: list[Arrow]


@dataclass(frozen=True)
class Bound:
    """What bounds a layout: what most of the longest chain of a step is (mm.compare.chain).

    limit: computing (on all its ranks alike), uneven (computing, while other ranks have less to compute),
    pipeline (computing, while other stages wait for it), cores (waiting for one), exchanging (within a
    module: collectives of its tp, cp or ep, and weights gathered over its data ranks), messages (rows, hidden
    states and gradients under way), updating (gradient sums and the optimizer) or data. module: "" for cores
    and the last three. rank: where most of it is. share: of the step. text: all of it in a sentence.
    """

    limit: Limit
    module: str
    rank: int
    share: float
    text: str


@dataclass(frozen=True)
class RunResult:
    """One layout of a comparison.

    file: the layout's. command: trains under it. config: the resolved config as YAML.
    losses, grad_norms_by_module: of each step of the first round. max_rel_*, speedup*: against the baseline,
    which is the first layout. speedup_interval: None where there are too few steps.
    peak_memory_bytes: of the fullest process: on the CPU with all that Python and its libraries hold.
    flops_by_module: of a step, over all ranks, attention and scan included, recomputation not.
    tflops_per_device: 1e12 FLOPs a second of a step and rank of the comparison, idle ranks included.
    tflops_per_device_by_module: its parts. tflops_while_busy: by module, a rank's while it is in the
    module's actions, waiting for inputs left out. mfu: of the stated peak, None without one.
    memory_by_kind: tensors of the fullest rank (fullest_rank) at its peak, by MEMORY_KINDS.
    imbalance: by module, the costliest dp rank over the mean by FLOPs. boundary: by encoder.
    ranks: by rank. bound: None where nothing was observed.
    """

    name: str
    layout: Mapping[str, Any]
    step_s: StepSeconds
    tokens_per_s: float
    peak_memory_bytes: int
    boundary_bytes_per_step: float
    losses: list[float]
    grad_norms_by_module: list[Mapping[str, float]]
    max_rel_loss_diff: float
    max_rel_grad_norm_diff: float
    speedup: float
    speedup_interval: Interval | None
    speedup_verdict: SpeedupVerdict
    file: str = ""
    command: str = ""
    config: str = ""
    rounds: list[list[float]] = field(default_factory=list)
    flops_by_module: Mapping[str, float] = field(default_factory=dict)
    tflops_per_device: float = 0.0
    tflops_per_device_by_module: Mapping[str, float] = field(default_factory=dict)
    tflops_while_busy: Mapping[str, float] = field(default_factory=dict)
    mfu: float | None = None
    memory_by_kind: Mapping[str, int] = field(default_factory=dict)
    fullest_rank: int = 0
    imbalance: Mapping[str, float] = field(default_factory=dict)
    boundary: Mapping[str, Edge] = field(default_factory=dict)
    placed: Mapping[str, Placed] = field(default_factory=dict)
    ranks: list[RankResult] = field(default_factory=list)
    timeline: Timeline | None = None
    bound: Bound | None = None


@dataclass(frozen=True)
class Verdict:
    """What a comparison means.

    fastest: the layout with the least median step, and layouts that the rounds cannot tell from it after it.
    sentences: in plain words: which is fastest, by how much, and what bounds each. next_steps: what to try.
    """

    fastest: list[str]
    sentences: list[str]
    next_steps: list[str]


@dataclass(frozen=True)
class Stopped:
    """Why a comparison ended before its last round.

    name, file: the layout that ran then, in round `round`, from 1. rank: who failed, None where nobody knows
    or none did. interrupted: a signal ended it; else that layout failed, and is not among the runs.
    """

    name: str
    file: str
    round: int
    rank: int | None
    why: str
    interrupted: bool = False


@dataclass(frozen=True)
class Comparison:
    """Layouts of one job measured in interleaved rounds.

    command: of the comparison itself. config_file: as given. world: ranks. steps: of a round, of which the
    first warms up. peak_tflops: of a device, as stated, None where it was not. host: facts on the machine and
    the versions, and the date. stopped: None where it ran to its end; else `rounds` are those that all of
    `runs` have ended.
    """

    runs: list[RunResult]
    command: str = ""
    config_file: str = ""
    world: int = 1
    rounds: int = 0
    steps: int = 0
    peak_tflops: float | None = None
    host: Mapping[str, str | int | float] = field(default_factory=dict)
    verdict: Verdict | None = None
    stopped: Stopped | None = None
