"""What actions cost, in seconds: the input of a simulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

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
    exchange: by (module, stage, kind) or else by (module, kind), for one micro-batch, the seconds of each
        expert exchange in a computation, in order. They come on top of `compute`, and lie evenly in it. A
        computation that is not named has none.
    load: by (module, micro-batch), a factor on the module's computations, for ragged batches.
    cores: how many cores all ranks share, where an action uses at most one; None if each rank has its own.
    share: by module, how much of a core its ranks use on average while the one with most work computes, where
        cores are shared; 1 where it is not named.
    units: by module, in how many units FSDP gathers the weights of a stage in a computation, or sums its
        gradients, one beside the computation of another; 1 where it is not named.
    sums: by module, GRAD_SYNC of backwards before the last of a step, where these take less: sums over
        replicas come once.
    """

    compute: Mapping[tuple[str, Kind] | tuple[str, int, Kind], float] = field(default_factory=dict)
    transfer: Mapping[tuple[str, Kind], float] = field(default_factory=dict)
    exchange: Mapping[tuple[str, Kind] | tuple[str, int, Kind], tuple[float, ...]] = field(
        default_factory=dict
    )
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    cores: float | None = None
    share: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, a: Action) -> float:
        """The duration of an action on parameters, or of a computation alone, its exchanges included."""
        one = self.compute.get((a.module, a.stage, a.kind))
        if one is None:
            one = self.compute.get((a.module, a.kind), USUAL.get(a.kind, 0.0))
        if a.kind not in COMPUTE:
            return one
        if self.exchange:
            one += sum(self._exchanges(a))
        return one * self._load(a)

    def pair_seconds(self, forward: Action, backward: Action) -> float:
        """The duration of a pair (Action.paired)."""
        return alternate(self.turns(forward), self.turns(backward))

    def turns(self, a: Action) -> Turns:
        """A computation as what lies between its exchanges, and these."""
        load, exchanges = self._load(a), self._exchanges(a)
        computed = self.seconds(a) - load * sum(exchanges)
        return Turns(computed / (len(exchanges) + 1), tuple(load * seconds for seconds in exchanges))

    def _exchanges(self, a: Action) -> tuple[float, ...]:
        named = self.exchange.get((a.module, a.stage, a.kind))
        return self.exchange.get((a.module, a.kind), ()) if named is None else named

    def _load(self, a: Action) -> float:
        return sum(self.load.get((a.module, i), 1.0) for i in a.microbatches) if self.load else a.span

    def beyond(self, a: Action, kind: Kind) -> float:
        """Seconds that a stage's gather begins before a computation in which it goes on, or a sum ends after.

        One unit at least. kind: GATHER or GRAD_SYNC.
        """
        moved, units = self.transfer.get((a.module, kind), 0.0), self.units.get(a.module, 1)
        return max(moved / units, moved - self.seconds(a) * (1 - 1 / units)) if moved else 0.0


class Turns(NamedTuple):
    """A computation that exchanges rows of experts: `piece` seconds of it before, between and after the
    `exchanges`, each of so many seconds."""

    piece: float
    exchanges: tuple[float, ...]


def alternate(first: Turns, second: Turns) -> float:
    """The seconds of two computations of a rank that take turns: each computes up to its next exchange, then
    the other does while that is under way.

    Exchanges follow one another too: those of a rank share its link. The result is never less than all pieces
    together or all exchanges together, and never more than both.
    """
    both, at = (first, second), [0, 0]
    there = [0.0, 0.0]  # when what each waits for has come
    now = link = 0.0
    turn = 0
    while min(at[k] - len(both[k].exchanges) for k in (0, 1)) <= 0:
        now = max(now, there[turn]) + both[turn].piece
        if at[turn] < len(both[turn].exchanges):
            there[turn] = link = max(now, link) + both[turn].exchanges[at[turn]]
        at[turn] += 1
        other = 1 - turn
        if at[other] <= len(both[other].exchanges):
            turn = other
    return now


def measured_costs(records: Mapping[int, Sequence[Record]], *, cores: float | None = None) -> Costs:
    """Costs of the computations of a run: medians over ranks and micro-batches, without waiting.

    cores: how many cores the simulated ranks share. The measured run should then have had a core for each of
        its ranks; otherwise its times already contain the sharing.
    """
    seen: dict[tuple[str, int, Kind], list[float]] = defaultdict(list)
    for run in records.values():
        for k, (action, _, end, ready) in enumerate(run):
            paired = action.paired or (k and run[k - 1].action.paired)  # it shares its time with another one
            if action.kind in COMPUTE and not paired:
                seen[action.module, action.stage, action.kind].append((end - ready) / action.span)
    return Costs({key: median(times) for key, times in seen.items()}, cores=cores)
