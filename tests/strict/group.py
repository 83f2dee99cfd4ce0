"""A process group under the referee's rules, whose data a gloo group carries.

It is registered as the backend "strict". An operation reaches the inner group when the referee has started it
on all of its ranks, so gloo's own buffers and queues never decide an order.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo

from tests.strict.calls import Comm, Op
from tests.strict.link import Link, Posted, Start

BACKEND = "strict"
_BATCH = inspect.unwrap(dist.batch_isend_irecv).__code__


@dataclass(frozen=True)
class Options:
    """What the default group is made with; groups made later take it from there."""

    link: Link


class StrictWork(dist.Work):
    """Handle of an operation; those of one batch are complete together."""

    def __init__(self, link: Link, posted: Posted | None, tensors: object = None) -> None:
        super().__init__()
        self._link, self.posted, self._tensors = link, posted, tensors

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.posted is not None:
            self._link.wait(self.posted, timeout.total_seconds())
        self._tensors = None
        return True

    def is_completed(self) -> bool:
        return self.posted is None or self.posted.done.is_set()


class StrictGroup(dist.ProcessGroup):
    """A group of `ranks` (global). Collectives without elements are dropped, as NCCL drops them."""

    def __init__(self, given: Any, link: Link) -> None:
        rank, size = given.group_rank, given.group_size
        super().__init__(rank, size)
        self.ranks = tuple(given.global_ranks_in_group) or tuple(range(size))
        self.link, self._group = link, str(given.group_id)
        self._inner: Any = ProcessGroupGloo(PrefixStore("inner/", given.store), rank, size, given.timeout)
        self._batch: list[tuple[Op, Start, StrictWork]] = []
        link.groups.append(self)

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._group

    def shutdown(self) -> None:
        self._inner = None
        self.link.groups.remove(self)

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    # messages

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        return self._message("send", tensors, dst)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        return self._message("recv", tensors, src)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        raise RuntimeError("strict: NCCL does not receive from any source")

    def _message(self, kind: str, tensors: list[Tensor], peer: int) -> dist.Work:
        (x,) = tensors
        op = Op(kind, x.numel(), _dtype(x), self.ranks[peer])
        move = self._inner.send if kind == "send" else self._inner.recv

        def start(tag: int) -> Any:
            return move(tensors, peer, tag)

        size = _batch_size()
        if not size:
            return StrictWork(self.link, self._post(self._comm(op), [op], [start]), tensors)
        work = StrictWork(self.link, None, tensors)
        self._batch.append((op, start, work))
        if len(self._batch) == size:
            batch, self._batch = self._batch, []
            comm = Comm(self._group, self.ranks)
            posted = self._post(comm, [b[0] for b in batch], [b[1] for b in batch], batch=True)
            for _, _, one in batch:
                one.posted = posted
        return work

    def _comm(self, op: Op) -> Comm:
        """The communicator of an unbatched message."""
        mine = self.ranks[self.rank()]
        if self.link.eager:
            return Comm(self._group, self.ranks)
        return Comm(self._group, (min(mine, op.peer), max(mine, op.peer)), pair=True)

    def _post(self, comm: Comm, ops: list[Op], starts: list[Start], *, batch: bool = False) -> Posted:
        name = self.group_desc if self.group_desc not in ("", "undefined") else "group"
        of = f"{name} {self._group} of ranks {', '.join(map(str, self.ranks))}"
        label = f"{of}, pair {comm.ranks[0]}:{comm.ranks[1]}" if comm.pair else of
        return self.link.post(comm, ops, starts, label=label, batch=batch)

    # collectives

    def _collective(
        self,
        kind: str,
        x: Tensor,
        call: Callable[[], Any],
        keep: object,
        *,
        detail: str = "",
        n: int | None = None,
    ) -> dist.Work:
        """x: what must be alike on all members; n: its elements, where not x's. keep: tensors in use."""
        op = Op(kind, x.numel() if n is None else n, _dtype(x), detail=detail)
        return self._together(op, call, keep) if op.numel else StrictWork(self.link, None)

    def _together(self, op: Op, call: Callable[[], Any], keep: object) -> dist.Work:
        posted = self._post(Comm(self._group, self.ranks), [op], [lambda tag: call()])
        return StrictWork(self.link, posted, keep)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceOptions()
        call = partial(self._inner.allreduce, tensors, opts)
        return self._collective("all_reduce", tensors[0], call, tensors, detail=_reduction(opts))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceCoalescedOptions()
        call = partial(self._inner.allreduce_coalesced, tensors, opts)
        n = sum(x.numel() for x in tensors)
        return self._collective("all_reduce", tensors[0], call, tensors, detail=_reduction(opts), n=n)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        call = partial(self._inner.reduce, tensors, opts)
        detail = f"{_reduction(opts)}, to {self.ranks[opts.rootRank]}"
        return self._collective("reduce", tensors[0], call, tensors, detail=detail)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        call = partial(self._inner.broadcast, tensors, opts)
        return self._collective(
            "broadcast", tensors[0], call, tensors, detail=f"from {self.ranks[opts.rootRank]}"
        )

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        call = partial(self._inner.allgather, outputs, inputs, opts or dist.AllgatherOptions())
        return self._collective("all_gather", inputs[0], call, (outputs, inputs))

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        call = partial(self._inner._allgather_base, output, x, opts or dist.AllgatherOptions())
        return self._collective("all_gather", x, call, (output, x))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        call = partial(self._inner.reduce_scatter, outputs, inputs, opts)
        return self._collective(
            "reduce_scatter", outputs[0], call, (outputs, inputs), detail=_reduction(opts)
        )

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        call = partial(self._inner._reduce_scatter_base, output, x, opts)
        return self._collective("reduce_scatter", output, call, (output, x), detail=_reduction(opts))

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        call = partial(self._inner.gather, outputs, inputs, opts)
        to = f"to {self.ranks[opts.rootRank]}"
        return self._collective("gather", inputs[0], call, (outputs, inputs), detail=to)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        call = partial(self._inner.scatter, outputs, inputs, opts)
        root = f"from {self.ranks[opts.rootRank]}"
        return self._collective("scatter", outputs[0], call, (outputs, inputs), detail=root)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> dist.Work:
        call = partial(self._inner.alltoall, outputs, inputs, opts)
        splits = tuple(x.numel() for x in inputs), tuple(x.numel() for x in outputs)
        op = Op("all_to_all", 0, _dtype(inputs[0]), splits=splits)
        return self._together(op, call, (outputs, inputs))

    def all_to_all_single(
        self, output: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], opts: Any = None
    ) -> dist.Work:
        """With splits NCCL sends messages of no elements too, so all members meet."""
        call = partial(
            self._inner.alltoall_base, output, x, out_splits, in_splits, opts or dist.AllToAllOptions()
        )
        if not out_splits and not in_splits:
            return self._collective("all_to_all", x, call, (output, x))
        op = Op(
            "all_to_all",
            0,
            _dtype(x),
            splits=(self._elements(x, in_splits), self._elements(output, out_splits)),
        )
        return self._together(op, call, (output, x))

    def _elements(self, x: Tensor, splits: list[int]) -> tuple[int, ...]:
        row = x.shape[1:].numel()
        each = splits or [len(x) // len(self.ranks)] * len(self.ranks)
        return tuple(n * row for n in each)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._together(Op("barrier", 0, "-"), lambda: None, None)

    # as torch before 2.12 calls them
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def register() -> None:
    """Make the backend known to torch, once a process."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(given: Any, options: Options | None) -> StrictGroup:
    world = dist.group.WORLD if dist.is_initialized() else None
    assert options is not None or isinstance(world, StrictGroup), "groups of a strict job are all strict"
    return StrictGroup(given, options.link if options is not None else world.link)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _reduction(opts: Any) -> str:
    return opts.reduceOp.op.name.lower()


def _batch_size() -> int:
    """How many messages the batch_isend_irecv() has that is calling; 0 where none is.

    It calls backends that it does not know message by message, which NCCL would issue as one group."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame.f_code is _BATCH:
            return len(frame.f_locals["p2p_op_list"])
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 0
