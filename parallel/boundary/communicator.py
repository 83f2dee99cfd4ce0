"""Executes boundary plans: rows to the destination's layout, gradients back to the source's."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.boundary.plan import EdgePlan, Transfer
from parallel.boundary.repeats import Repeats
from parallel.comm.linear_map import linear_map
from parallel.comm.pending import Pending
from parallel.comm.transport import Channel, Finish, move, pick, start_all_to_all, start_p2p, tag_of
from parallel.sequence.host import Indices

Transport = Literal["auto", "p2p", "all_to_all"]


@dataclass
class Stats:
    """Sums since the last reset, by edge name.

    bytes_received: payload received from other ranks, in bytes.
    seconds: host time spent in transfers, in seconds.
    """

    bytes_received: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def reset(self) -> None:
        """Set all sums to zero."""
        self.bytes_received.clear()
        self.seconds.clear()


class BoundaryCommunicator:
    """Moves rows between layouts.

    group: holds every rank of both sides of the communicator's edges.
    device: where the rows are.
    timeout_s: the longest wait of the host, in seconds; where the device's queue waits, the group's own
        timeout is the bound.
    transport: "p2p" sends each peer just its rows. "all_to_all" is one collective of the group with uneven
        splits. "auto" is p2p where `device` is the host, where it is faster, and all_to_all elsewhere.
        Nothing is sent for an edge that moves no row.

    All ranks of an edge must start its transfers in the same order. Over all_to_all, and on backends without
    tags, the order of all edges' transfers must be the same. In a plan with node_size, ranks forward rows
    that they receive; over p2p they do so in wait(), so no rank may omit a wait(), or delay it for long.

    Tensors are [rows, ..] of any dtype and trailing dims, equal on all ranks; ranks that hold nothing pass 0
    rows. A plan that knows its row_shape has it checked before anything is sent. Results may share memory
    with the input where no row moves: write to neither.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 120.0,
        transport: Transport = "auto",
    ) -> None:
        self.group = group
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        if transport == "auto":
            transport = "p2p" if self.device.type == "cpu" else "all_to_all"
        self.transport = transport
        self.stats = Stats()
        self._second_hops: deque[Finish] = deque()  # to start, of transfers under way, in their order

    def close(self) -> None:
        """Destroy the group, where this rank is in it and it is not the default one."""
        outside: object = dist.GroupMember.NON_GROUP_MEMBER  # a rank that is not in it
        if self.group is not dist.group.WORLD and self.group is not outside:
            dist.destroy_process_group(self.group)

    def forward(self, plan: EdgePlan, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..]; no autograd.

        Raises ValueError where the number or shape of x's rows is not that of the plan; RuntimeError naming
        the edge, the direction and the rank waited for when a peer does not answer in time.
        """
        return self.start_forward(plan, x).wait()

    def start_forward(self, plan: EdgePlan, x: Tensor) -> Pending:
        """forward() without waiting: work until wait() overlaps with the transfer."""
        pending, repeats = self._start(plan, "forward", plan.forward, x), plan.repeats
        return pending if repeats is None else Pending(lambda: _copied(pending.wait(), repeats))

    def backward(self, plan: EdgePlan, grad: Tensor) -> Tensor:
        """Gradients [rows wanted here, ..] to [rows held here, ..]; no autograd.

        Gradients of distinct consumers of a row are added, always in the same order; a row that nobody
        consumed gets zero. Raises as forward() does.
        """
        return self.start_backward(plan, grad).wait()

    def start_backward(self, plan: EdgePlan, grad: Tensor) -> Pending:
        """backward() without waiting."""
        if plan.repeats is not None:
            self._check_rows(plan, "backward", plan.backward[0], grad)
            grad = _summed(grad, plan.repeats)
        parts = [self._start(plan, "backward", t, grad) for t in plan.backward]
        if len(parts) == 1:
            return parts[0]

        def add() -> Tensor:
            first, *others = [part.wait() for part in parts]
            # Not in place, as `first` may be a view of the gradient.
            total = first.to(_sum_dtype(first), copy=True)
            for other in others:
                total += other
            return total.to(first.dtype)

        return Pending(add)

    def exchange(self, plan: EdgePlan, x: Tensor, *, grads: bool = True) -> Tensor:
        """forward() with autograd: the gradient goes back through backward().

        Every rank must then run its backward, those with no rows too. Their result is part of the graph, so
        it has to enter the loss (its sum is zero). `grads` must be equal on all ranks; False is for a source
        that does not learn, and sends no gradient back.
        """
        if not grads:
            return self.forward(plan, x.detach())
        if torch.is_grad_enabled() and not x.requires_grad:
            # A rank that only receives takes part in the backward too.
            x = x.detach().requires_grad_()
        transfers = (plan.forward, *plan.backward)
        if plan.repeats is None and all(t.identity and not t.moves for t in transfers):
            return self.forward(plan, x)  # x itself, whose gradient is that of the result: nothing to record
        return linear_map(x, lambda y: self.forward(plan, y), lambda grad: self.backward(plan, grad))

    def _check_rows(self, plan: EdgePlan, direction: str, t: Transfer, x: Tensor) -> None:
        edge = plan.name
        if x.shape[0] != t.rows_in:
            raise ValueError(
                f"edge {edge}, {direction}: rank {t.rank} gave {x.shape[0]} rows, the plan has {t.rows_in}"
            )
        if plan.row_shape is not None and x.shape[1:] != plan.row_shape:
            raise ValueError(
                f"edge {edge}, {direction}: rank {t.rank} gave rows of shape {list(x.shape[1:])}, "
                f"the plan has {list(plan.row_shape)}"
            )

    def _start(self, plan: EdgePlan, direction: str, t: Transfer, x: Tensor) -> Pending:
        self._check_rows(plan, direction, t, x)
        edge = plan.name
        begin = time.perf_counter()
        x = x.contiguous()
        if t.view is not None:
            out = x if t.view == slice(0, t.rows_in) else x[t.view]
        else:
            # Rows that do not come are zero: the gradients of rows without a consumer.
            make = torch.empty if t.covered else torch.zeros
            out = make((t.rows_out, *x.shape[1:]), dtype=x.dtype, device=x.device)
        land = self._depart(f"edge {edge}, {direction}", t, x, out) if t.moves else None
        if t.view is None:
            move(out, t.keep.dest, x, t.keep.source, Indices())  # while the others' rows are on their way
        row = x.shape[1:].numel() * x.element_size()
        self.stats.bytes_received[edge] += t.received_rows * row
        self.stats.seconds[edge] += time.perf_counter() - begin

        def wait() -> Tensor:
            begin = time.perf_counter()
            if land is not None:
                land()
            self.stats.seconds[edge] += time.perf_counter() - begin
            return out

        return Pending(wait)

    def _depart(self, name: str, t: Transfer, x: Tensor, out: Tensor) -> Finish:
        """Start the first hop; the result completes both."""
        channel = Channel(name, self.group, self.timeout_s)
        start = start_p2p if self.transport == "p2p" else start_all_to_all
        tag, second_tag = (tag_of(f"{name}, hop {hop}") for hop in (1, 2))
        first = start(channel, t.sends, t.recvs, x, out, tag)
        if t.relay is None:
            return first
        relay, second = t.relay, []

        def start_second() -> None:
            first()
            second.append(start(channel, relay.sends, relay.recvs, out, out, second_tag))

        def finish() -> None:
            # In order: other ranks may wait for rows that earlier transfers bring here.
            while not second:
                self._second_hops.popleft()()
            second[0]()

        self._second_hops.append(start_second)
        if self.transport != "p2p" or x.device.type != "cpu":
            # Collectives need one order on all ranks; on a device, its queue waits and not the host.
            while not second:
                self._second_hops.popleft()()
        return finish


def _copied(out: Tensor, repeats: Repeats) -> Tensor:
    """Fill the further places of rows that are read several times, from their first places; in place."""
    indices = Indices()
    for _, of, to in repeats.rounds:
        out.index_copy_(0, indices.on(to, out.device), pick(out, of, indices))
    return out


def _summed(grad: Tensor, repeats: Repeats) -> Tensor:
    """The gradient with those of further places added to the first one, in one order on every device."""
    indices = Indices()
    total = pick(grad, repeats.first, indices).to(_sum_dtype(grad))
    for which, _, to in repeats.rounds:  # each row once a round, so that no two additions race
        total.index_add_(0, indices.on(which, grad.device), pick(grad, to, indices).to(total.dtype))
    return grad.index_copy(0, indices.on(repeats.first, grad.device), total.to(grad.dtype))


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What gradients are summed in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
