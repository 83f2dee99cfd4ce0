"""Carries out boundary plans: rows to the destination's layout, gradients back to the source's."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.boundary.plan import EdgePlan, Transfer
from parallel.comm.linear_map import linear_map
from parallel.comm.pending import Pending
from parallel.comm.transport import Channel, Finish, move, start_all_to_all, start_p2p, tag_of

Transport = Literal["auto", "p2p", "all_to_all"]


@dataclass
class Stats:
    """Payload received from other ranks in bytes, and host time spent in seconds, by edge name since the
    last reset."""

    bytes_received: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def reset(self) -> None:
        """Start again from nothing."""
        self.bytes_received.clear()
        self.seconds.clear()


class BoundaryCommunicator:
    """Moves rows between layouts over `group`, which holds every rank of both sides of its edges.

    transport: "p2p" sends each peer just its rows; "all_to_all" is one collective of the group with uneven
    splits; "auto" is p2p where `device` is the host, which wins there, else all_to_all. Nothing is sent for
    an edge that moves no row. timeout_s bounds every wait (where the device waits, the group's own does).
    All ranks of an edge start its transfers in the same order; over all_to_all, and on backends without tags,
    those of all edges. A plan with node_size has ranks send on what they receive: over p2p they do so in
    wait(), so no rank may leave one out, or put it off for long.

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
        self._to_send_on: deque[Finish] = deque()  # of transfers under way that have a second hop

    def close(self) -> None:
        """Destroy the group, where this rank is in it and it is not the default one."""
        if self.group is not dist.group.WORLD and self.group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(self.group)

    def forward(self, plan: EdgePlan, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..]; no autograd.

        Raises ValueError where x has other rows than the plan, in number or shape; RuntimeError naming the
        edge, the direction and the rank waited for when a peer does not answer in time.
        """
        return self.start_forward(plan, x).wait()

    def start_forward(self, plan: EdgePlan, x: Tensor) -> Pending:
        """The same without waiting: work until wait() overlaps with the transfer."""
        return self._start(plan, "forward", plan.forward, x)

    def backward(self, plan: EdgePlan, grad: Tensor) -> Tensor:
        """Gradients [rows wanted here, ..] to [rows held here, ..]; no autograd. Distinct consumers of a row
        are summed, always in the same order; rows that nobody consumed get zero."""
        return self.start_backward(plan, grad).wait()

    def start_backward(self, plan: EdgePlan, grad: Tensor) -> Pending:
        """The same without waiting."""
        parts = [self._start(plan, "backward", t, grad) for t in plan.backward]
        if len(parts) == 1:
            return parts[0]

        def add() -> Tensor:
            first, *others = [part.wait() for part in parts]
            total = first + others[0]  # not in place: `first` may be a view of the gradient
            for other in others[1:]:
                total += other
            return total

        return Pending(add)

    def exchange(self, plan: EdgePlan, x: Tensor, *, grads: bool = True) -> Tensor:
        """forward() with autograd: the gradient goes back through backward().

        Every rank must then run its backward, those with no rows too: their result is part of the graph, so
        let it enter the loss (its sum is zero). With `grads` False, on all ranks alike, no gradient is
        returned: for a source that does not learn.
        """
        if not grads:
            return self.forward(plan, x.detach())
        if torch.is_grad_enabled() and not x.requires_grad:
            # A rank that only receives takes part in the backward all the same.
            x = x.detach().requires_grad_()
        if all(t.identity and not t.moves for t in (plan.forward, *plan.backward)):
            return self.forward(plan, x)  # x itself, and its gradient is the result's: nothing to record
        return linear_map(x, lambda y: self.forward(plan, y), lambda grad: self.backward(plan, grad))

    def _start(self, plan: EdgePlan, direction: str, t: Transfer, x: Tensor) -> Pending:
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
        begin = time.perf_counter()
        x = x.contiguous()
        if t.view is not None:
            out = x if t.view == slice(0, t.rows_in) else x[t.view]
        else:
            # Rows that nobody has are zero: gradients of rows without a consumer.
            make = torch.empty if t.covered else torch.zeros
            out = make((t.rows_out, *x.shape[1:]), dtype=x.dtype, device=x.device)
        land = self._depart(f"edge {edge}, {direction}", t, x, out) if t.moves else None
        if t.view is None:
            move(out, t.keep.dest, x, t.keep.source)  # while the others' rows are on their way
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
        """Start the first hop; the result completes the transfer."""
        channel = Channel(name, self.group, self.timeout_s)
        start = start_p2p if self.transport == "p2p" else start_all_to_all
        tag, tag_on = (tag_of(f"{name}, hop {hop}") for hop in (1, 2))
        first = start(channel, t.sends, t.recvs, x, out, tag)
        if t.relay is None:
            return first
        relay, second = t.relay, []

        def send_on() -> None:
            first()
            second.append(start(channel, relay.sends, relay.recvs, out, out, tag_on))

        def finish() -> None:
            # Others may wait for the rows that earlier transfers bring here.
            while not second:
                self._to_send_on.popleft()()
            second[0]()

        self._to_send_on.append(send_on)
        if self.transport != "p2p" or x.device.type != "cpu":
            # Collectives need one order on all ranks; a device's queue does the waiting.
            while not second:
                self._to_send_on.popleft()()
        return finish
