"""Pipeline stages: which layers of a module live on which stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Stage:
    """The layers [start, stop) of a module, by global index, that one pipeline stage holds.

    first: it takes the module's inputs; last: it gives the module's outputs.
    """

    start: int
    stop: int
    first: bool = True
    last: bool = True

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, (self.start, self.stop)

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)


def whole(n_layers: int) -> Stage:
    """All of a module in one stage."""
    return Stage(0, n_layers)


def stages_of(bounds: Sequence[int]) -> tuple[Stage, ...]:
    """Stages from their boundaries, [0, .., n_layers]."""
    pairs = list(pairwise(bounds))
    return tuple(Stage(a, b, first=i == 0, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs))


def partition_layers(
    costs: Sequence[float], n: int, *, before: float = 0.0, after: float = 0.0
) -> tuple[Stage, ...]:
    """Partition layers into n contiguous stages, none empty, so that the costliest stage costs the least.

    costs: of each layer, in any one unit. before, after: cost of what the first and the last stage hold
    besides layers (embeddings; head, loss), in the same unit. Ties go to longer early stages.
    O(n * layers^2). Raises ValueError for more stages than layers.
    """
    layers = len(costs)
    if n > layers:
        raise ValueError(
            f"{n} pipeline stages for {layers} layers; needed: at most one a layer. Nearest: {layers}"
        )
    sums = [0.0]
    for c in costs:
        sums.append(sums[-1] + c)

    def cost(start: int, stop: int, k: int) -> float:
        return sums[stop] - sums[start] + (before if k == 0 else 0.0) + (after if k == n - 1 else 0.0)

    # best[k][i]: (cost of the costliest of the stages k.., layers i.. being left, where stage k ends)
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(n)]
    best[n - 1] = {i: (cost(i, layers, n - 1), layers) for i in range(n - 1, layers)}
    for k in range(n - 2, -1, -1):
        for i in range(k, layers - (n - k) + 1):
            ends = range(layers - (n - k - 1), i, -1)  # longest first, so that ties keep early stages long
            best[k][i] = min(((max(cost(i, j, k), best[k + 1][j][0]), j) for j in ends), key=lambda c: c[0])
    bounds = [0]
    for k in range(n):
        bounds.append(best[k][bounds[-1]][1])
    return stages_of(bounds)
