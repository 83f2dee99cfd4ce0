"""Where tensors are made and in which dtype; which dtype sums are kept in."""

from __future__ import annotations

from typing import TypedDict

import torch


class FactoryKwargs(TypedDict, total=False):
    """What torch's own modules call factory_kwargs: the two keywords that a layer hands on to its parts.

    factory: FactoryKwargs = {"device": device, "dtype": dtype}
    self.up = Linear(d, h, normal(std), **factory)
    """

    device: torch.device | str | None
    dtype: torch.dtype | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What norms, softmax, scan, router and loss of inputs of `dtype` compute in: float32, or float64 where
    they are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
