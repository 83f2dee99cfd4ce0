"""Collectives and messages as torch.distributed hands them to a process group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "recv",
}


class Given(NamedTuple):
    """One call as it was made.

    inputs, outputs: its tensors; those of a call in place are both. posted: whether it is asynchronous.
    """

    op: str
    group: dist.ProcessGroup
    inputs: list[Tensor]
    outputs: list[Tensor]
    posted: bool
    peer: int | None
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    tag: int


class DoneWork(dist.Work):
    """A call that is done at once and tells when somebody waits for it."""

    def __init__(self, on_wait: Callable[[], object]) -> None:
        super().__init__()
        self._on_wait = on_wait

    def wait(self, timeout: object = None) -> bool:
        """Tell it."""
        self._on_wait()
        return True

    def is_completed(self) -> bool:
        """Always."""
        return True


def read_call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """A call of an operation in torch.ops.c10d."""
    named = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    op = NAMES[func._schema.name.split("::")[-1]]
    group = dist.ProcessGroup.unbox(named["process_group"])
    into, of = _side(named, "output"), _side(named, "input")
    peer = named.get("dst", named.get("src"))
    return Given(
        op=op,
        group=group,
        inputs=of if op != "recv" else [],
        outputs=into if op != "send" else [],
        posted=bool(named.get("async_op", named.get("asyncOp", True))),
        peer=None if peer is None else int(dist.get_global_rank(group, int(peer))),
        sends=_bytes(of, named.get("input_split_sizes")),
        receives=_bytes(into, named.get("output_split_sizes")),
        tag=int(named.get("tag", 0)),
    )


def result(func: Any, given: Given, args: tuple[Any, ...], work: dist.Work) -> Any:
    """What the operation returns."""
    boxed = work.boxed()
    return (args[0], boxed) if len(func._schema.returns) == 2 else boxed


def size_of(given: Given) -> tuple[int, str]:
    """Bytes and dtype of the larger side of a call."""
    sides = [
        (sum(t.numel() * t.element_size() for t in side), side) for side in (given.inputs, given.outputs)
    ]
    size, side = max(sides, key=lambda s: s[0])
    some = side or given.inputs or given.outputs
    return size, str(some[0].dtype).removeprefix("torch.") if some else ""


def _side(named: Mapping[str, Any], side: str) -> list[Tensor]:
    """The tensors of one side of a call; those of a call in place are both."""
    for key in (f"{side}_tensor", f"{side}_tensors", side, f"{side}s", "tensors", "tensor"):
        if key in named:
            return _flat(named[key])
    return []


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in _flat(y)]


def _bytes(tensors: list[Tensor], splits: list[int] | None) -> tuple[int, ...]:
    """Bytes of each member's rows; empty where the call has no splits."""
    if not splits:
        return ()
    (x,) = tensors
    row = math.prod(x.shape[1:]) * x.element_size()
    return tuple(n * row for n in splits)


def values_after(given: Given, members: Sequence[Tensor], rank: int, shape: torch.Size) -> Tensor | None:
    """Values of a collective's output; None where they are not known.

    members: values of the input on each member. rank: this rank's index in the group.
    """
    if given.op == "all_gather":
        return torch.cat([x.reshape(-1) for x in members]).view(shape)
    if given.op == "all_to_all" and not given.sends and members[0].numel() % len(members) == 0:
        return torch.cat([x.reshape(len(members), -1)[rank] for x in members]).view(shape)
    return None
