"""What ranks compute, send and hold in a step, free of any hardware: what is counted and priced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from parallel.schedule.action import Kind
from parallel.topology.groups import Group

Class = Literal["product", "grouped", "attention", "convolution", "memory"]


class Kernel(NamedTuple):
    """Equal calls of one operation.

    kind: "memory" is all that multiplies no matrices: norms, activations, copies, sums, the optimizer.
    shape: of a product (m, n, k); of a grouped one (groups, rows, n, k): rows of all groups together, which
        are what a gradient of weights sums over; of attention (heads, queries, keys, head dim); of others ().
    flops: of one call, a multiply and an add as two. bytes: that one call reads and writes.
    times: how many calls, which may be a mean.
    """

    kind: Class
    shape: tuple[int, ...]
    dtype: str
    flops: float
    bytes: float
    times: float = 1.0


class Message(NamedTuple):
    """Equal collectives or messages of one rank.

    op: all_reduce, all_gather, reduce_scatter, all_to_all or send. group: its process group.
    bytes: of the largest tensor that one call is given or gives on this rank, as mm.virtual records a Call.
    times: how many calls, which may be a mean.
    """

    op: str
    group: Group
    bytes: float
    times: float = 1.0


@dataclass(frozen=True)
class Work:
    """What one rank does in one action: its kernels, and the messages that the action waits for."""

    kernels: tuple[Kernel, ...] = ()
    messages: tuple[Message, ...] = ()

    @cached_property
    def flops(self) -> float:
        """FLOPs of all kernels."""
        return sum(k.flops * k.times for k in self.kernels)


@dataclass(frozen=True)
class Held:
    """Bytes that one rank of a module's pipeline rank holds.

    parameters, optimizer: between steps too. gathered: whole weights, and gradients: sums, while they are
    there at the peak. temporary: the most that one action needs beside what it keeps.
    """

    parameters: float
    optimizer: float
    gathered: float
    gradients: float
    temporary: float


@dataclass(frozen=True)
class Counts:
    """A step of a job, as its busiest data rank has it.

    work: by (module, stage, kind), of one micro-batch of mean load; kind is FORWARD, BACKWARD, its halves, or
        OPTIMIZER for the whole step. Recomputation is in the backward.
    moved: by (module, stage, kind) with kind GATHER or GRAD_SYNC, messages of a step over data ranks.
    load: by (module, micro-batch), the factor on `work` of ragged data.
    kept: by (module, stage), bytes of activations from a forward of mean load to its backward.
    hidden: by (module, stage), bytes of the hidden states that a rank sends to the next stage.
    rows: by edge (source module, stage of the sink), bytes that the rank with most receives in a micro-batch.
    held: by (module, pipeline rank).
    """

    work: Mapping[tuple[str, int, Kind], Work]
    moved: Mapping[tuple[str, int, Kind], tuple[Message, ...]] = field(default_factory=dict)
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    kept: Mapping[tuple[str, int], float] = field(default_factory=dict)
    hidden: Mapping[tuple[str, int], float] = field(default_factory=dict)
    rows: Mapping[tuple[str, int], float] = field(default_factory=dict)
    held: Mapping[tuple[str, int], Held] = field(default_factory=dict)
