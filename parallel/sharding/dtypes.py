"""The device and dtype that tensors are made with, and the dtype that sums accumulate in."""

from __future__ import annotations

from typing import TypedDict

import torch


class FactoryKwargs(TypedDict, total=False):
    """The keywords that a layer passes on to its parts; torch's own modules call them factory_kwargs.

    factory: FactoryKwargs = {"device": device, "dtype": dtype}
    self.up = Linear(d, h, normal(std), **factory)
    """

    device: torch.device | str | None
    dtype: torch.dtype | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, softmax, scan, router and loss compute in, for inputs of `dtype`.

    float64 for float64 inputs, float32 for all others.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
