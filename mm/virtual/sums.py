"""Sums of gradients in the update, whose size differs between data ranks where a weight is split unevenly.

A rank sends its shards of some weights in one message: those of tp's partial weights to the ranks of tp,
those of tied weights to the other end of the pipeline. What one rank has of each weight follows from its
place among the ranks that share it, as FSDP splits it: in equal parts, rounded up, the last ones shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from mm.ranks.job import Job
from mm.virtual.records import Call, Part, Trace
from parallel.topology.groups import Ranks

Label = str  # of a communicator, as Call.group has it


def sums_of(job: Job, names: Mapping[str, Label]) -> dict[Label, tuple[tuple[Part, ...], ...]]:
    """By communicator, the parts of each message that is summed there. names: of groups, their labels."""
    found: dict[Label, list[tuple[Part, ...]]] = {}
    for optimizer in job.optimizers.values():
        mesh = optimizer.mesh
        for group, chosen in (
            (mesh.axes.tp.group, [s.param for s in optimizer.shards if s.partial]),
            (mesh.ends, [s.param for s in optimizer.shards if s.shared]),
        ):
            if group is not None and chosen:
                parts = tuple(_part(p, names) for p in chosen)
                found.setdefault(names[group.group_name], []).append(parts)
    return {label: tuple(messages) for label, messages in found.items()}


def _part(param: torch.Tensor, names: Mapping[str, Label]) -> Part:
    size = param.numel() * param.element_size()
    if not isinstance(param, DTensor):
        return Part(1, size, "")
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard) and param.device_mesh.size(axis) > 1:
            group: dist.ProcessGroup = param.device_mesh.get_group(axis)
            rows = param.shape[placement.dim]
            return Part(rows, size // max(rows, 1), names[group.group_name])
    return Part(1, size, "")


def bytes_of(parts: Sequence[Part], rank: int, named: Mapping[Label, Ranks]) -> int:
    """Bytes that a rank has of the parts of a message. named: its communicators."""
    total = 0
    for part in parts:
        ranks: Sequence[int] = named[part.split_over] if part.split_over else (rank,)
        each = -(-part.rows // len(ranks))
        total += min(each, max(0, part.rows - each * ranks.index(rank))) * part.row_bytes
    return total


def is_sum(call: Call, trace: Trace) -> bool:
    """Whether a call is one of these messages."""
    return call.during == "update" and call.op == "all_reduce" and call.group in trace.sums


def sums_at(trace: Trace, rank: int, named: Mapping[Label, Ranks]) -> Iterator[tuple[int, int]]:
    """(number of the call, its bytes on `rank`) of each of these messages, for a rank of the same kind."""
    left = {label: list(messages) for label, messages in trace.sums.items()}
    for k, call in enumerate(trace.calls):
        if is_sum(call, trace):
            yield k, bytes_of(left[call.group].pop(0), rank, named) if left[call.group] else -1


def sum_problems(trace: Trace, named: Mapping[Label, Ranks]) -> list[str]:
    """Whether the messages of a traced rank are those of its weights: at most one line."""
    planned = {k: size for k, size in sums_at(trace, trace.rank, named)}
    for k, size in planned.items():
        if trace.calls[k].bytes != size:
            return [
                f"{trace.calls[k].group}: rank {trace.rank} sums {trace.calls[k].bytes} bytes of gradients, "
                f"but its shards have {size}"
            ]
    if len(planned) != sum(map(len, trace.sums.values())):
        return [f"rank {trace.rank} sums its gradients in {len(planned)} messages, fewer than it has groups"]
    return []
