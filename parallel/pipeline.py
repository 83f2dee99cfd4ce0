"""Messages between the pipeline ranks of one module: activations onward, gradients back.

Shapes follow from the step plan, so nothing is agreed here; empty tensors are not sent at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.waiting import wait_for


@dataclass(frozen=True)
class Pipe:
    """One direction of a module's pipeline. name: what errors call it; timeout_s bounds every wait."""

    name: str
    group: dist.ProcessGroup
    timeout_s: float
    _sent: deque[tuple[Callable[[], None], Tensor]] = field(default_factory=deque, repr=False)

    def send(self, x: Tensor, peer: int, tag: int) -> None:
        """Start sending x to global rank `peer`. It is kept alive until complete; finish() waits for all."""
        if not x.numel():
            return
        x = x.contiguous()
        work = dist.isend(x, peer, group=self.group, tag=tag)
        assert work is not None
        self._sent.append((lambda: self._wait(work, x.device, "take its message", peer), x))

    def receive(
        self, shape: Sequence[int], peer: int, tag: int, *, dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """Start receiving a tensor from global rank `peer`; the result waits for it and returns it."""
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        if not x.numel():
            return lambda: x
        work = dist.irecv(x, peer, group=self.group, tag=tag)

        def wait() -> Tensor:
            self._wait(work, device, "send", peer)
            return x

        return wait

    def finish(self) -> None:
        """Wait for all sends under way."""
        while self._sent:
            wait, _ = self._sent.popleft()
            wait()

    def _wait(self, work: Any, device: torch.device, what: str, peer: int) -> None:
        try:
            wait_for(work, device, self.timeout_s)
        except RuntimeError as error:
            raise RuntimeError(
                f"pipeline {self.name}: rank {peer} did not {what} within {self.timeout_s:g} s; it has "
                f"ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error
