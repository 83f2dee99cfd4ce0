"""Which rank brought a weight's gradient that is not finite: ranks have added up their parts before it shows.

The step is run again, as it was: its data are there, the weights are as before, and nothing in it is random.
This time each part is looked at before it is added. That costs a step, only where a step has failed so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.blame import Part, brought
from mm.train.flight import Key
from mm.train.step import run_step
from mm.train.trail import TOLD, samples_of
from parallel.schedule import Kind, Record
from parallel.sharding import whole
from parallel.sharding.param import declared

BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def find_parts(job: Job, prepared: Prepared) -> str:
    """In words, whose part of a gradient is not finite when a step is run again; every rank calls this.

    Gradients and all sums of the step are those of the second run then.
    """
    for optimizer in job.optimizers.values():
        optimizer.discard()
    watch = _Watch(job, prepared)
    with watch.hooked():
        run_step(job, prepared, train=True, observe=watch.seen)
    sums = torch.zeros((), dtype=torch.float64, device=job.rank.device)
    for optimizer in job.optimizers.values():
        optimizer.collect()
        sums = sums + optimizer.norm_squared()
    mine = json.dumps([bool(torch.isfinite(sums)), watch.found[:TOLD]])
    everyone = [json.loads(text) for text in job.control.tell(mine)]
    found = [Part(*part) for _, parts in everyone for part in parts]
    return brought(found, again=not all(finite for finite, _ in everyone))


class _Watch:
    """Looks at the gradients of weights as backwards of this rank give them."""

    def __init__(self, job: Job, prepared: Prepared) -> None:
        self.job, self.prepared = job, prepared
        self.found: list[Part] = []
        self._fresh: list[tuple[str, str, Tensor]] = []  # of the backward under way: module, name, finite

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Look at the gradients of all backwards inside. Collective over the data ranks of each module."""
        handles = []
        for module in self.job.optimizers:
            for part in self.job.parts[module].values():
                whole.gather(part)  # whole weights are what a backward gives gradients to
                whole.wait(part)
                for name, weight, _ in declared(part):
                    if weight.requires_grad:
                        look = partial(self._look, module, name)
                        handles.append(weight.register_hook(look))  # type: ignore[no-untyped-call]
                if self.job.blueprint.uses[module].params != "replicated":
                    whole.free(part)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, module: str, name: str, grad: Tensor) -> None:
        self._fresh.append((module, name, torch.isfinite(grad).all()))

    def seen(self, done: Record) -> None:
        """An action has ended: what it gave is of its micro-batches."""
        action = done.action
        if action.kind not in BACKWARDS:
            return
        fresh, self._fresh = self._fresh, []
        for module, name, finite in fresh:
            if not finite:
                batches = range(action.microbatch, action.microbatch + action.span)
                keys = [Key(module, action.stage, i) for i in batches]
                samples = [s for key in keys for s in samples_of(self.job, self.prepared, key)]
                rank = self.job.rank.rank
                dp = self.job.blueprint.layouts[module].coord(rank).dp
                self.found.append(Part(name, module, rank, dp, action.microbatch, samples))
