"""Carries out boundary plans: rows to the destination's layout, gradients back to the source's."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.boundary.plan import EdgePlan, Rows, Transfer, count

Transport = Literal["auto", "p2p", "all_to_all"]


@dataclass
class Stats:
    """Payload received from other ranks, and time spent, by edge name since the last reset."""

    bytes_received: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def reset(self) -> None:
        self.bytes_received.clear()
        self.seconds.clear()


class Pending:
    """A transfer under way; wait() completes it and returns the rows."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


class BoundaryCommunicator:
    """Moves rows between layouts over `group`, which holds every rank of both sides of its edges.

    transport: "p2p" sends each peer just its rows; "all_to_all" is one collective of the group with uneven
    splits; "auto" is p2p on gloo, where it wins, and all_to_all elsewhere. Nothing is sent for an edge that
    moves no row. timeout_s bounds every wait.
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
        self.timeout = timedelta(seconds=timeout_s)
        if transport == "auto" and group is not dist.GroupMember.NON_GROUP_MEMBER:
            transport = "p2p" if "gloo" in dist.get_backend(group) else "all_to_all"
        self.transport = transport
        self.stats = Stats()

    def close(self) -> None:
        """Destroy the group, where this rank is in it and it is not the default one."""
        if self.group is not dist.group.WORLD and self.group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(self.group)

    def forward(self, plan: EdgePlan, x: Tensor) -> Tensor:
        """x [rows held here, ..] to [rows wanted here, ..]; no autograd. Ranks holding nothing pass 0 rows.

        Raises ValueError where x has other rows than the plan, RuntimeError naming the edge, the direction
        and the rank waited for when a peer does not answer in time.
        """
        return self.start_forward(plan, x).wait()

    def start_forward(self, plan: EdgePlan, x: Tensor) -> Pending:
        """The same without waiting: work until wait() overlaps with the transfer."""
        return self._start(plan.name, "forward", plan.forward, x)

    def backward(self, plan: EdgePlan, grad: Tensor) -> Tensor:
        """Gradients [rows wanted here, ..] to [rows held here, ..]; no autograd."""
        total = self._start(plan.name, "backward", plan.backward[0], grad).wait()
        for transfer in plan.backward[1:]:
            total = total + self._start(plan.name, "backward", transfer, grad).wait()
        return total

    def exchange(self, plan: EdgePlan, x: Tensor) -> Tensor:
        """forward() with autograd: the gradient goes back through backward()."""
        return _Exchange.apply(x, self, plan)

    def _start(self, edge: str, direction: str, t: Transfer, x: Tensor) -> Pending:
        if x.shape[0] != t.rows_in:
            raise ValueError(
                f"edge {edge}, {direction}: rank {t.rank} gave {x.shape[0]} rows, the plan has {t.rows_in}"
            )
        start = time.perf_counter()
        collective = t.moves and self.transport == "all_to_all"  # a call that every rank of the group makes
        if t.identity and not collective:
            return Pending(lambda: x)
        x = x.contiguous()
        # Rows that nobody has are zero (gradients of rows without a consumer).
        make = torch.empty if t.covered else torch.zeros
        out = make((t.rows_out, *x.shape[1:]), dtype=x.dtype, device=x.device)
        launch = self._p2p if self.transport == "p2p" else self._all_to_all
        finish = launch(f"edge {edge}, {direction}", t, x, out) if t.moves else None
        _copy(out, t.keep[1], _pick(x, t.keep[0]))
        row_bytes = x[:1].numel() * x.element_size() if x.shape[0] else out[:1].numel() * x.element_size()
        self.stats.bytes_received[edge] += t.received_rows * row_bytes
        self.stats.seconds[edge] += time.perf_counter() - start

        def wait() -> Tensor:
            begin = time.perf_counter()
            if finish is not None:
                finish()
            self.stats.seconds[edge] += time.perf_counter() - begin
            return out

        return Pending(wait)

    def _p2p(self, what: str, t: Transfer, x: Tensor, out: Tensor) -> Callable[[], None]:
        ops, landing = [], []
        for peer, rows in t.recvs:
            buffer = out[rows] if isinstance(rows, slice) else out.new_empty((len(rows), *out.shape[1:]))
            landing.append((rows, buffer))
            ops.append(dist.P2POp(dist.irecv, buffer, peer, self.group))
        for peer, rows in t.sends:
            ops.append(dist.P2POp(dist.isend, _pick(x, rows), peer, self.group))
        peers = [peer for peer, _ in (*t.recvs, *t.sends)]
        works = self._guard(what, peers, lambda: dist.batch_isend_irecv(ops)) if ops else []

        def finish() -> None:
            # gloo has one handle a message, in order; other backends one for the batch.
            each = len(works) == len(peers)
            for i, work in enumerate(works):
                self._guard(what, [peers[i]] if each else peers, partial(work.wait, self.timeout))
            for rows, buffer in landing:
                if not isinstance(rows, slice):
                    _copy(out, rows, buffer)

        return finish

    def _all_to_all(self, what: str, t: Transfer, x: Tensor, out: Tensor) -> Callable[[], None]:
        ranks = dist.get_process_group_ranks(self.group)
        sends, recvs = dict(t.sends), dict(t.recvs)
        none = slice(0, 0)
        splits_in = [count(sends.get(r, none)) for r in ranks]
        splits_out = [count(recvs.get(r, none)) for r in ranks]
        packed = torch.cat([_pick(x, sends[r]) for r in ranks if r in sends] or [x[:0]])
        landed = out.new_empty((sum(splits_out), *out.shape[1:]))
        work = dist.all_to_all_single(landed, packed, splits_out, splits_in, group=self.group, async_op=True)

        def finish() -> None:
            self._guard(what, ranks, lambda: work.wait(self.timeout))
            parts = dict(zip(ranks, landed.split(splits_out), strict=True))
            for r, rows in recvs.items():
                _copy(out, rows, parts[r])

        return finish

    def _guard(self, what: str, peers: list[int], call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            named = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {peers}"
            raise RuntimeError(
                f"{what}: no answer from {named} within {self.timeout.total_seconds():.0f} s; "
                f"it has ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: BoundaryCommunicator, plan: EdgePlan) -> Tensor:
        ctx.communicator, ctx.plan = communicator, plan
        y = communicator.forward(plan, x)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.communicator.backward(ctx.plan, grad), None, None


def _pick(x: Tensor, rows: Rows) -> Tensor:
    """Rows of x: a view where they are consecutive, else one indexed copy."""
    if isinstance(rows, slice):
        return x[rows]
    return x.index_select(0, _index(rows, x))


def _copy(out: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        if rows.stop > rows.start:
            out[rows].copy_(values)
    else:
        out.index_copy_(0, _index(rows, out), values)


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)
