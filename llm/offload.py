"""Tensors that the backward needs, kept in host memory instead of the device's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.sharding.param import local


@dataclass(frozen=True)
class OnHost:
    """A copy in host memory; pinned if it comes from an accelerator, which then copies while it computes."""

    copy: Tensor
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> OnHost:
        # Same strides, so that the backward computes the same products.
        copy = torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
        return OnHost(copy.copy_(x.detach(), non_blocking=True), x.device)

    def back(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=True)


def to_host(module: nn.Module, min_bytes: int) -> saved_tensors_hooks:
    """A context that moves tensors of at least min_bytes, kept for a backward, to the host.

    Weights of `module` stay on the device. Recomputed parts keep only their inputs, which go to the host too.
    """

    def pack(x: Tensor) -> Tensor | OnHost:
        if x.numel() * x.element_size() < min_bytes or _shares(x, module):
            return x
        return OnHost.of(x)

    def unpack(kept: Tensor | OnHost) -> Tensor:
        return kept.back() if isinstance(kept, OnHost) else kept

    return saved_tensors_hooks(pack, unpack)


def _shares(x: Tensor, module: nn.Module) -> bool:
    """Whether x is a view of a weight; looked up each time, since the memory of sharded weights changes."""
    at = x.untyped_storage().data_ptr()
    return any(local(p).untyped_storage().data_ptr() == at for p in module.parameters())
