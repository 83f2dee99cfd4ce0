"""The peers of benchmarks/boundary.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Case = tuple[int, int, int, int, bool, bool]


@dataclass(frozen=True)
class Peer:
    """One forward and backward; whether its rows were right; payload bytes received here."""

    step: Callable[[], Any]
    exact: bool
    bytes: int


def megatron_peer() -> Callable[[Case, torch.Tensor], Peer | None] | None:
    """megatron-core's communicators on gloo, or None where it cannot be imported.

    Patched from outside only: device and backend, and the debug line that sums every message (0.19.2), which
    would be timed too.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    for name in ("new_group", "new_subgroups_by_enumeration"):
        setattr(dist, name, _on_gloo(getattr(dist, name)))
    try:
        from megatron.core.hyper_comm_grid import HyperCommGrid
        from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
        from megatron.core.pipeline_parallel import bridge_communicator
    except ImportError:
        return None
    bridge_communicator.logging.debug = lambda *args, **kw: None
    torch_sum = torch.Tensor.sum

    def grid(tp: int, dp: int, first: int) -> Any:
        made = HyperCommGrid([tp, 1, 1, dp], ["tp", "cp", "pp", "dp"], rank_offset=first, backend="gloo")
        for axis in ("tp", "cp", "pp", "dp"):
            made.create_pg([axis])
        return made

    def megatron_core(case: Case, full: torch.Tensor) -> Peer | None:
        stp, sdp, dtp, ddp, _, apart = case
        rank, rows = dist.get_rank(), len(full)
        source, dest = grid(stp, sdp, 0), grid(dtp, ddp, 2 if apart else 0)

        def share(tp: int, dp: int, first: int) -> torch.Tensor:
            lane = (rank - first) // tp
            return full[lane * rows // dp : (lane + 1) * rows // dp].contiguous()

        if not apart:
            link = ColocatedBridgeCommunicator(source, dest, "enc", "language", dim_mapping={"b": 0, "h": 1})
            x, g = share(stp, sdp, 0).requires_grad_(), -share(dtp, ddp, 0)

            def step() -> torch.Tensor:
                x.grad = None
                y = link.communicate(x)
                y.backward(g)
                return y

            y = step()
            return Peer(step, torch.equal(y.detach(), -g) and torch.equal(x.grad, -x.detach()), 0)
        bridge = bridge_communicator.BridgeCommunicator(
            source,
            dest,
            dim_mapping={"s": 0, "b": 1, "h": 2},
            comm_dtype=full.dtype,
            src_module_name="enc",
            dest_module_name="language",
            tensor_ndim=2,
        )
        here = share(stp, sdp, 0) if rank < 2 else -share(dtp, ddp, 2)

        def apart_step() -> torch.Tensor:
            # The peer sums each message for a log line; without that the race is of communication alone.
            torch.Tensor.sum = lambda self, *a, **k: 0.0  # type: ignore[method-assign]
            try:
                if rank < 2:
                    bridge.send_forward(here)
                    return bridge.recv_backward()
                y = bridge.recv_forward()
                bridge.send_backward(here)
                return y
            finally:
                torch.Tensor.sum = torch_sum  # type: ignore[method-assign]

        return Peer(apart_step, torch.equal(apart_step().detach(), -here), 0)

    return megatron_core


def _on_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kw: Any) -> Any:
        return make(*args, **{**kw, **({"backend": "gloo"} if kw.get("backend") == "nccl" else {})})

    return made


def all_gather_peer(case: Case, full: torch.Tensor) -> Peer | None:
    """What torch alone offers for colocated fan-in: all ranks gather everything, gradients are cut out."""
    stp, sdp, dtp, ddp, _, apart = case
    if apart or stp != 1 or dtp * ddp != 4:
        return None
    rank, n = dist.get_rank(), len(full) // sdp
    x = full[rank * n : (rank + 1) * n].contiguous()
    out = torch.empty_like(full)

    def step() -> torch.Tensor:
        dist.all_gather_into_tensor(out, x)
        return out[rank * n : (rank + 1) * n].contiguous()

    return Peer(step, torch.equal(step(), x), 0)
