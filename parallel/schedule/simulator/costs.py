"""What actions cost: the numbers a simulation needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from parallel.schedule.action import COMPUTE, Action, Kind
from parallel.schedule.record import Record

# A backward costs two forwards, and its halves one each: the customary estimate.
USUAL = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}


@dataclass(frozen=True)
class Costs:
    """Seconds of actions.

    compute: by (module, kind), or by (module, stage, kind), which goes before; what is in neither takes
        USUAL, and actions on parameters nothing. They are for one micro-batch.
    transfer: by (module, kind) with kind SEND_FORWARD, SEND_BACKWARD or a boundary's: from the moment that
        all ends have started it until the rows are there; what is not in it takes nothing.
    load: by (module, micro-batch), a factor on what the module computes in it, for ragged batches.
    cores: all ranks share so many cores, each action being able to use one; None where each has its own.
    """

    compute: Mapping[tuple[str, Kind] | tuple[str, int, Kind], float] = field(default_factory=dict)
    transfer: Mapping[tuple[str, Kind], float] = field(default_factory=dict)
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    cores: float | None = None

    def seconds(self, a: Action) -> float:
        """What a computation or an action on parameters takes."""
        one = self.compute.get((a.module, a.stage, a.kind))
        if one is None:
            one = self.compute.get((a.module, a.kind), USUAL.get(a.kind, 0.0))
        if a.kind not in COMPUTE:
            return one
        if not self.load:
            return one * a.span
        return one * sum(self.load.get((a.module, i), 1.0) for i in a.microbatches)


def measured_costs(records: Mapping[int, Sequence[Record]], *, cores: float | None = None) -> Costs:
    """Costs of the computations of a run: the median over ranks and micro-batches, waiting left out.

    cores: what the ranks to be simulated share. The run should then have had a core for each of its ranks, or
    its times hold the sharing already.
    """
    seen: dict[tuple[str, int, Kind], list[float]] = defaultdict(list)
    for run in records.values():
        for action, _, end, ready in run:
            if action.kind in COMPUTE:
                seen[action.module, action.stage, action.kind].append((end - ready) / action.span)
    return Costs({key: median(times) for key, times in seen.items()}, cores=cores)
