"""Statistics of each layer in one step: its gradients, and what its forwards gave (train.statistics).

All of it is summed on the device; the report at the end of the step carries it to the other ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.module import EncoderModule, encoder_axes
from llm.moe import ForwardContext
from mm.plan.places import layer_paths
from mm.ranks.job import Job
from mm.train.metrics import GradientStatistics, LayerStatistics, OutputStatistics
from mm.train.rank_report import LayerReport, Own
from parallel.sequence.host import to_device
from parallel.topology.axis import Axes

Hook = Callable[[Any, tuple[Any, ...], Any], None]


class Watch:
    """What the forwards of a step give, layer by layer, on this rank.

    Each token, or row, counts on one rank: on the first of the tp ranks that all have it. Padding does not
    count, nor what a backward computes again.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._here = job, threading.local()
        names = [(m, name) for m, places in job.places.items() for name in places.places]
        self._row = {name: k for k, name in enumerate(names)}
        device = job.rank.device
        self._outputs = torch.zeros((len(names), 3), dtype=torch.float64, device=device)  # sums, largest
        self._counts = [0] * len(names)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to the layers of this rank."""
        with ExitStack() as stack:
            for m, parts in self._job.parts.items():
                for part in parts.values():
                    axes = inner = self._job.meshes[m].axes
                    if isinstance(part, EncoderModule):
                        inner = encoder_axes(type(part.encoder), axes)
                    if axes.tp.rank and not inner.sequence_parallel:
                        continue
                    for path, layer in layer_paths(part).items():
                        handle = layer.register_forward_hook(self._hook(self._row[m, path], inner))
                        stack.callback(handle.remove)
            yield

    @contextmanager
    def forward(self, counts: bool = True) -> Iterator[None]:
        """A forward of this thread: a backward beside it, in another, may compute layers again."""
        self._here.counts = counts
        try:
            yield
        finally:
            self._here.counts = False

    def _hook(self, row: int, axes: Axes) -> Hook:
        sums = self._outputs[row]

        def hook(_: Any, args: tuple[Any, ...], out: Any) -> None:
            values = out[0] if isinstance(out, tuple) else out
            if not getattr(self._here, "counts", False) or not isinstance(values, Tensor):
                return
            x = values.detach()
            if len(args) > 1 and isinstance(args[1], ForwardContext):
                x = x[: _real(args[1], len(x), axes)]
            if not x.numel():
                return
            with torch.no_grad():
                self._counts[row] += x.numel()
                sums[0] += x.sum(dtype=torch.float64)
                sums[1] += torch.linalg.vector_norm(x, dtype=torch.float64).square()
                sums[2] = torch.maximum(sums[2], torch.linalg.vector_norm(x, torch.inf).to(sums.dtype))

        return hook

    def report(self) -> dict[tuple[str, str], LayerReport[Own]]:
        """This rank's part, by module and place, when gradients are collected: of all places, also of those
        that are on other ranks alone."""
        squares, largest = torch.zeros_like(self._outputs[:, :2]).T.contiguous()
        for m, optimizer in self._job.optimizers.items():
            found = optimizer.gradients()
            of = self._job.places[m].of
            rows = np.asarray([self._row[m, of[name]] for name in found.names], dtype=np.int64)
            at = to_device(rows, squares.device)
            squares.index_add_(0, at, found.squares)
            largest.scatter_reduce_(0, at, found.largest, "amax")
        table = zip(squares, largest, self._counts, self._outputs, strict=True)
        return {
            name: LayerReport[Own](square, most, float(count), *sums)
            for name, (square, most, count, sums) in zip(self._row, table, strict=True)
        }


def _real(ctx: ForwardContext, width: int, axes: Axes) -> int:
    """How many of the tokens that a rank has between layers come before the padding."""
    return min(max(ctx.n_real - axes.tp.rank * width, 0), width) if axes.sequence_parallel else ctx.n_real


def layer_statistics(
    job: Job, ranks: Mapping[tuple[str, str], LayerReport[np.ndarray]]
) -> dict[str, dict[str, LayerStatistics]]:
    """By module and place, from the reports of all ranks; none where there are no reports."""
    out: dict[str, dict[str, LayerStatistics]] = {}
    for (m, name), x in ranks.items():
        kind, trained = job.places[m].places[name]
        gradient = GradientStatistics(float(np.sqrt(x.grad_squares.sum())), float(x.grad_max.max()))
        n, output = x.elements.sum(), None
        if n:
            mean, square = float(x.total.sum() / n), float(x.squares.sum() / n)
            output = OutputStatistics(int(n), mean, square**0.5, float(x.largest.max()))
        out.setdefault(m, {})[name] = LayerStatistics(kind, gradient if trained else None, output)
    return out
