"""Where numbers stopped being finite in a step, as this rank has seen it.

Each computation leaves sums of what it took and gave, as scalars on the device. They are read only where the
message at the end of a step says that the loss or a gradient is not finite, so nothing waits for them before.
A sum is not finite where an element is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mm.checkpoint.finite import names_not_finite
from mm.checkpoint.state import state_tensors
from mm.config.outline import SINK
from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.blame import CAME, CAME_BACK, GAVE, GAVE_BACK, Findings, Place
from mm.train.flight import Key

TOLD = 4  # of each kind, that a rank tells the others

Maybe = Iterable[Tensor | None]


class _Mark(NamedTuple):
    """A computation. entered, left: sums of what it took and gave, as gradients where it was a backward."""

    back: bool
    keys: Sequence[Key]
    entered: list[Tensor]
    left: list[Tensor]


class Trail:
    """The computations of a training step on this rank, in their order. prepared: the step's data."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self._marks = prepared, list[_Mark]()

    def forward(self, keys: Sequence[Key], entered: Maybe, left: Maybe) -> None:
        """Note what a forward took of other computations, and what it gave. keys: what it covered."""
        self._marks.append(_Mark(False, keys, _sums(entered), _sums(left)))

    def backward(self, keys: Sequence[Key], entered: Maybe, left: Maybe) -> None:
        """Note the gradients that a backward took and gave."""
        self._marks.append(_Mark(True, keys, _sums(entered), _sums(left)))

    def findings(self, job: Job) -> Findings:
        """What of this rank is not finite; gradients have been collected. Waits for the device."""
        broken, large = list[str](), list[str]()
        for m, optimizer in job.optimizers.items():
            found = optimizer.gradients()
            for name, finite, element in zip(found.names, *map(_finite, found[1:]), strict=True):
                if not finite:
                    (large if element else broken).append(f"{m}.{name}")
        return Findings(
            weights=names_not_finite(job, state_tensors(job).items())[:TOLD],
            inputs=self._inputs()[:TOLD],
            spots=self._spots(job),
            gradients=broken[:TOLD],
            overflows=large[:TOLD],
        )

    def _inputs(self) -> list[Place]:
        """The items with inputs that are not finite."""
        return [
            Place("input", m, 0, i, [mb.names[m][k]])
            for i, mb in enumerate(self.prepared.micro)
            for m, batch in mb.items.items()
            for k, own in enumerate(torch.split(batch.values, list(batch.lengths)), batch.first)
            if not bool(torch.isfinite(own).all())
        ]

    def _spots(self, job: Job) -> dict[str, list[Place]]:
        """The first computations that took or gave what is not finite, by how (SPOTS)."""
        every = [value for mark in self._marks for value in (*mark.entered, *mark.left)]
        fine = iter(_finite(torch.stack(every)) if every else ())
        out: dict[str, list[Place]] = {}
        for mark in self._marks:
            entered, left = (all([next(fine) for _ in values]) for values in (mark.entered, mark.left))
            if entered and left:
                continue
            spot = (GAVE_BACK if mark.back else GAVE) if entered else (CAME_BACK if mark.back else CAME)
            found = out.setdefault(spot, [])
            if len(found) < TOLD:
                found.append(self._place(job, mark))
        return out

    def _place(self, job: Job, mark: _Mark) -> Place:
        first = mark.keys[0]
        last = first.stage == len(job.blueprint.stages[first.module]) - 1
        what = ("the loss" if first.module == SINK else "rows") if last else "hidden states"
        samples = [name for key in mark.keys for name in samples_of(job, self.prepared, key)]
        return Place(what, first.module, first.stage, first.microbatch, samples)


def samples_of(job: Job, prepared: Prepared, key: Key) -> Sequence[str]:
    """Names of the samples that a computation of this rank was of."""
    if key.module != SINK:
        return prepared.micro[key.microbatch].names.get(key.module, ())
    planned = prepared.plan.microbatches[key.microbatch]
    mine = planned.samples_of(job.blueprint.layouts[SINK].coord(job.rank.rank).dp)
    return [planned.sample(j).name for j in mine]


def _sums(values: Maybe) -> list[Tensor]:
    """A float64 scalar for each tensor."""
    return [v.detach().sum().to(torch.float64) for v in values if v is not None]


def _finite(values: Tensor) -> list[bool]:
    found: list[bool] = torch.isfinite(values).tolist()
    return found
