"""Keeping what the backward needs in the host's memory instead of the device's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.sharding.param import local


@dataclass(frozen=True)
class OnHost:
    """A copy in host memory, pinned where an accelerator can copy it while it computes."""

    copy: Tensor
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> OnHost:
        # The strides stay, so that the backward runs the same products.
        copy = torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
        return OnHost(copy.copy_(x.detach(), non_blocking=True), x.device)

    def back(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=True)


def to_host(module: nn.Module, min_bytes: int) -> saved_tensors_hooks:
    """A context in which tensors of at least min_bytes that are kept for a backward go to the host.

    Weights of `module` stay, which the backward reads where they are. Recomputed parts keep their inputs
    only, which go to the host too.
    """

    def pack(x: Tensor) -> Tensor | OnHost:
        if x.numel() * x.element_size() < min_bytes or _shares(x, module):
            return x
        return OnHost.of(x)

    def unpack(kept: Tensor | OnHost) -> Tensor:
        return kept.back() if isinstance(kept, OnHost) else kept

    return saved_tensors_hooks(pack, unpack)


def _shares(x: Tensor, module: nn.Module) -> bool:
    """Whether x is a view of a weight; asked anew each time because sharded weights come and go."""
    at = x.untyped_storage().data_ptr()
    return any(local(p).untyped_storage().data_ptr() == at for p in module.parameters())
