"""Messages between the pipeline ranks of one module: activations to later stages, gradients back.

Shapes follow from the step plan, so no message carries them (law 4). Empty tensors are not sent at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.waiting import wait_for


class _Sent(NamedTuple):
    """A message under way, and its memory, which is kept until the message has left."""

    work: dist.Work
    x: Tensor


@dataclass(frozen=True)
class Pipe:
    """One direction of a module's pipeline.

    name: what errors call it.
    group: the ranks of the pipeline, in a group of this direction alone.
    timeout_s: the longest wait, in seconds.
    """

    name: str
    group: dist.ProcessGroup
    timeout_s: float
    _sent: dict[tuple[int, int], _Sent] = field(default_factory=dict, repr=False)

    def send(self, x: Tensor, peer: int, tag: int) -> None:
        """Start sending x to global rank `peer`. x is kept until release() or finish(): host backends do not
        report when a message has left."""
        if not x.numel():
            return
        x = x.contiguous()
        work = dist.isend(x, peer, group=self.group, tag=tag)
        assert work is not None, "a rank sends in groups that it is in"
        self._sent[peer, tag] = _Sent(work, x)

    def release(self, peer: int, tag: int) -> None:
        """Wait until a message has left, then free it. It leaves once `peer` has started to receive it.

        Raises RuntimeError naming the pipeline and the peer where that takes longer than timeout_s.
        """
        sent = self._sent.pop((peer, tag), None)  # empty ones were never sent
        if sent is not None:
            self._wait(sent.work, sent.x.device, "take its message", peer)

    def receive(
        self, shape: Sequence[int], peer: int, tag: int, *, dtype: torch.dtype, device: torch.device
    ) -> Callable[[], Tensor]:
        """Start receiving a tensor [*shape] from global rank `peer`; the result waits for it and returns it.

        Raises RuntimeError, when called, where the peer does not send within timeout_s.
        """
        x = torch.empty(tuple(shape), dtype=dtype, device=device)
        if not x.numel():
            return lambda: x
        work = dist.irecv(x, peer, group=self.group, tag=tag)
        assert work is not None, "a rank receives in groups that it is in"

        def wait() -> Tensor:
            self._wait(work, device, "send", peer)
            return x

        return wait

    def finish(self) -> None:
        """release() all messages under way."""
        for peer, tag in list(self._sent):
            self.release(peer, tag)

    def _wait(self, work: dist.Work, device: torch.device, what: str, peer: int) -> None:
        try:
            wait_for(work, device, self.timeout_s)
        except RuntimeError as error:
            raise RuntimeError(
                f"pipeline {self.name}: rank {peer} did not {what} within {self.timeout_s:g} s; it has "
                f"ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error
