"""Which dtype sums are kept in while weights and activations have another."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What norms, softmax, scan, router and loss of inputs of `dtype` compute in: float32, or float64 where
    they are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
