"""Messages between the pipeline ranks of one module: activations onward, gradients back.

Shapes follow from the step plan, so nothing is agreed here; empty tensors are not sent at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.waiting import wait_for


class _Sent(NamedTuple):
    """A message under way to global rank `peer`."""

    work: Any
    peer: int
    x: Tensor


@dataclass(frozen=True)
class Pipe:
    """One direction of a module's pipeline. name: what errors call it; timeout_s bounds every wait."""

    name: str
    group: dist.ProcessGroup
    timeout_s: float
    _sent: deque[_Sent] = field(default_factory=deque, repr=False)

    def send(self, x: Tensor, peer: int, tag: int) -> None:
        """Start sending x to global rank `peer`. It is kept alive until complete; finish() waits for all."""
        # Host backends do not say whether a message has left: there all stay until finish().
        while self._sent and self._sent[0].work.is_completed():
            self._sent.popleft()
        if not x.numel():
            return
        x = x.contiguous()
        self._sent.append(_Sent(dist.isend(x, peer, group=self.group, tag=tag), peer, x))

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
            sent = self._sent.popleft()
            self._wait(sent.work, sent.x.device, "take its message", sent.peer)

    def _wait(self, work: Any, device: torch.device, what: str, peer: int) -> None:
        try:
            wait_for(work, device, self.timeout_s)
        except RuntimeError as error:
            raise RuntimeError(
                f"pipeline {self.name}: rank {peer} did not {what} within {self.timeout_s:g} s; it has "
                f"ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error
