"""What the boundary is raced against: megatron-core's communicators if importable, else an all-gather.

megatron-core is used as it is, from outside: its literal backend and device are replaced by those of this
run, and Tensor.sum() is a constant while its communicator between disjoint ranks runs, because that version
computes it only for a debug log on every message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import release

os.environ.setdefault("MEGATRON_LOGGING", "0")  # read when it is imported


class Layout(NamedTuple):
    """Degrees on consecutive ranks from `first` on, the axes fastest first."""

    tp: int
    dp: int
    first: int = 0
    cp: int = 1
    pp: int = 1
    axes: tuple[str, ...] = ("tp", "cp", "pp", "dp")

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.tp * self.dp * self.cp * self.pp)


Step = Callable[[], tuple[Tensor, Tensor]]  # forward and backward: (rows, gradients)


def version() -> str | None:
    """megatron-core's version, None where it is not importable."""
    try:
        import megatron.core
    except ImportError:
        return None
    return release(megatron.core.__version__)


@contextlib.contextmanager
def _our_backend() -> Iterator[None]:
    """Groups of the default group's backend, whatever backend is asked for; the CPU as current device."""
    ours = dist.get_backend()
    names = ("new_group", "new_subgroups_by_enumeration")
    saved = {name: getattr(dist, name) for name in names}
    device = torch.cuda.current_device

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: make(*a, **(k | {"backend": ours} if "backend" in k else k))

    for name, make in saved.items():
        setattr(dist, name, wrap(make))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        for name, make in saved.items():
            setattr(dist, name, make)
        torch.cuda.current_device = device


def _grid(layout: Layout) -> Any:
    from megatron.core.hyper_comm_grid import HyperCommGrid

    shape = [getattr(layout, axis) for axis in layout.axes]
    grid = HyperCommGrid(shape, list(layout.axes), rank_offset=layout.first, backend=dist.get_backend())
    for axis in layout.axes:
        grid.create_pg([axis])
    return grid


def megatron_colocated(source: Layout, dest: Layout, x: Tensor, grad: Tensor) -> Step:
    """Forward and backward of the communicator between layouts on the same ranks."""
    from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator

    with _our_backend():
        bridge = ColocatedBridgeCommunicator(
            _grid(source), _grid(dest), "enc", "llm", dim_mapping={"b": 0, "h": 1}
        )
    x = x.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = bridge.communicate(x)
        (back,) = torch.autograd.grad(y, x, grad)
        return y, back

    return step


def megatron_disjoint(source: Layout, dest: Layout, x: Tensor, grad: Tensor) -> Step:
    """Forward and backward of the communicator between disjoint ranks."""
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    with _our_backend():
        bridge = BridgeCommunicator(
            _grid(source),
            _grid(dest),
            dim_mapping={"s": 0, "b": 1, "h": 2},
            comm_dtype=x.dtype,
            src_module_name="enc",
            dest_module_name="llm",
            tensor_ndim=2,
        )
    sends = dist.get_rank() in source.ranks
    logged = torch.Tensor.sum

    def step() -> tuple[Tensor, Tensor]:
        with _our_backend():
            torch.Tensor.sum = lambda *a, **k: 0  # type: ignore[assignment,method-assign]
            try:
                if sends:
                    bridge.send_forward(x)
                    return x[:0], bridge.recv_backward()
                y = bridge.recv_forward()
                bridge.send_backward(grad)
                return y.detach(), grad[:0]
            finally:
                torch.Tensor.sum = logged  # type: ignore[method-assign]

    return step


def all_gather(x: Tensor, grad: Tensor, held: list[slice], wanted: list[slice]) -> Step:
    """Everything to everyone, each rank then takes its own; held and wanted: each rank's global rows.

    The obvious way without a plan, replicas and all: a floor to stand on, not a rival.
    """
    rank = dist.get_rank()

    def everything(mine: Tensor, spans: list[slice], rows: int) -> Tensor:
        size = max(s.stop - s.start for s in spans)
        padded = mine.new_zeros(size, mine.shape[1])
        padded[: len(mine)] = mine
        parts = mine.new_empty(len(spans) * size, mine.shape[1])
        dist.all_gather_into_tensor(parts, padded)
        full = mine.new_empty(rows, mine.shape[1])
        for span, part in zip(spans, parts.split(size), strict=True):
            full[span] = part[: span.stop - span.start]
        return full

    rows = max(s.stop for s in held)

    def step() -> tuple[Tensor, Tensor]:
        y = everything(x, held, rows)[wanted[rank]]
        return y, everything(grad, wanted, rows)[held[rank]]

    return step
