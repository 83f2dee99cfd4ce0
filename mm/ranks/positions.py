"""Positions of a packed stream on three axes, from what the plan knows of its samples: no payload is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mm.plan.step_plan import Microbatch
from parallel.context_parallel import ContextPacking
from parallel.sequence.grid import grid_positions
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing


def with_places(packing: Packing, mb: Microbatch, dp: int) -> Packing:
    """The packing of a dp rank's stream with the places of the rows of this rank; see RopeAxes.

    O(tokens) of the stream, on the host. Stages of a pipeline that read no text know it too.
    """
    parts = [grid_positions(mb.plan.inputs.runs(mb.sample(j))) for j in mb.samples_of(dp)]
    padding = mb.tokens[dp] - sum(part.shape[1] for part in parts)
    places = np.concatenate([*parts, grid_positions([padding])], axis=1)
    if isinstance(packing, ContextPacking):
        places = places[:, packing.rows]
    return replace(packing, places=to_device(places, packing.device))
