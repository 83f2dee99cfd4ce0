"""What actions cost, in seconds: the input of a simulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from parallel.schedule.action import COMPUTE, Action, Kind
from parallel.schedule.record import Record

# The customary estimate: a backward costs two forwards, and each of its halves one.
USUAL = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}


@dataclass(frozen=True)
class Costs:
    """Seconds of actions.

    compute: for one micro-batch, by (module, stage, kind) or else by (module, kind). Computations in neither
        take USUAL; actions on parameters in neither take nothing.
    transfer: by (module, kind), with kind SEND_FORWARD, SEND_BACKWARD or a boundary's: from the moment at
        which all ends have started it until the rows are there. Transfers that are not named take nothing.
        GATHER and GRAD_SYNC: of a stage's weights or gradients, also where computations move them.
    load: by (module, micro-batch), a factor on the module's computations, for ragged batches.
    cores: how many cores all ranks share, where an action uses at most one; None if each rank has its own.
    units: by module, in how many units FSDP gathers the weights of a stage in a computation, or sums its
        gradients, one beside the computation of another; 1 where it is not named.
    """

    compute: Mapping[tuple[str, Kind] | tuple[str, int, Kind], float] = field(default_factory=dict)
    transfer: Mapping[tuple[str, Kind], float] = field(default_factory=dict)
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    cores: float | None = None
    units: Mapping[str, int] = field(default_factory=dict)

    def seconds(self, a: Action) -> float:
        """The duration of a computation or an action on parameters."""
        one = self.compute.get((a.module, a.stage, a.kind))
        if one is None:
            one = self.compute.get((a.module, a.kind), USUAL.get(a.kind, 0.0))
        if a.kind not in COMPUTE:
            return one
        if not self.load:
            return one * a.span
        return one * sum(self.load.get((a.module, i), 1.0) for i in a.microbatches)

    def beyond(self, a: Action, kind: Kind) -> float:
        """Seconds that a stage's gather begins before a computation in which it goes on, or a sum ends after.

        One unit at least. kind: GATHER or GRAD_SYNC.
        """
        moved, units = self.transfer.get((a.module, kind), 0.0), self.units.get(a.module, 1)
        return max(moved / units, moved - self.seconds(a) * (1 - 1 / units)) if moved else 0.0


def measured_costs(records: Mapping[int, Sequence[Record]], *, cores: float | None = None) -> Costs:
    """Costs of the computations of a run: medians over ranks and micro-batches, without waiting.

    cores: how many cores the simulated ranks share. The measured run should then have had a core for each of
        its ranks; otherwise its times already contain the sharing.
    """
    seen: dict[tuple[str, int, Kind], list[float]] = defaultdict(list)
    for run in records.values():
        for action, _, end, ready in run:
            if action.kind in COMPUTE:
                seen[action.module, action.stage, action.kind].append((end - ready) / action.span)
    return Costs({key: median(times) for key, times in seen.items()}, cores=cores)
