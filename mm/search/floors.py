"""What the language model asks at least, from the costs of its documents alone: of all micro-batches and
policies of its degrees at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm.config.outline import SINK
from mm.search.bound import Floor
from mm.search.candidate import Block, Choice, Degrees
from mm.search.costs import Again
from mm.search.tokens import Sink


def floors(
    sink: Sink, block: Block, d: Degrees, policies: Sequence[str], numbers: Sequence[int], again: Again
) -> list[list[Floor]]:
    """By number of micro-batches, then by policy, the least under any schedule.

    From the costs of documents alone: a micro-batch of mean load costs at least its FLOPs, at the least
    seconds for one that any of the step's documents has; that of a schedule which halves backwards.
    """
    unit, weights = sink.unit(d, again), sink.weights
    costs = [sink.load.dealt(d.dp(block.size), m).costs for m in numbers]
    m = np.array(numbers, float)[:, None]
    mean = np.array([sum(c) for c in costs])[:, None] / m
    forward, early = unit.forward * mean + unit.launched, unit.early * mean + unit.relaunched
    backward = early + unit.late * mean
    waited = early if d.pp > 1 else backward  # of a backward, by the stage before
    first, last, least = _loads(costs, mean, unit.even)
    found = []
    for policy in policies:
        choice = Choice(block, d, policy)
        each, sums, before, after = weights.traffic(SINK, choice, (forward, backward, None), m, None)
        there, back = forward + each, backward + sums
        work = _by_rank(there + back, d) * m
        head = np.maximum(first * _before(there, d), before)
        through = head + _by_rank(there + waited, d) * m + last * _before(waited, d)
        alone = np.maximum(through, head + work + after).max(axis=1)
        one = (least * (there + waited)).sum(axis=1)
        owned = weights.held(SINK, choice)
        held = [o.held + o.gradients for o in owned]
        update = max(o.update for o in owned) + weights.message
        most, own = work.max(axis=1).tolist(), work[:, 0].tolist()
        rows = zip(alone.tolist(), one.tolist(), most, own, strict=True)
        found.append([Floor(*row, update, max(held), held[0]) for row in rows])
    return [list(row) for row in zip(*found, strict=True)]


def _loads(costs: Sequence[Sequence[float]], mean: np.ndarray, even: float) -> tuple[np.ndarray, ...]:
    """Load of the first, the last and the least micro-batch over the mean one, each [numbers, 1]."""
    each = [(c[0], c[-1], min(c)) for c in costs]
    alone = np.array([[len(c) == 1] for c in costs])
    safe = np.where(mean > 0, mean, 1.0)
    return tuple(np.where(alone, 1.0, np.array(x)[:, None] / safe * even) for x in zip(*each, strict=True))


def _by_rank(of: np.ndarray, d: Degrees) -> np.ndarray:
    """Of all virtual stages of a pipeline rank."""
    found: np.ndarray = of.reshape(len(of), d.vpp, d.pp).sum(axis=1)
    return found


def _before(of: np.ndarray, d: Degrees) -> np.ndarray:
    """Of the stages before each of the first ones."""
    own = of[:, : d.pp]
    found: np.ndarray = np.cumsum(own, axis=1) - own
    return found
