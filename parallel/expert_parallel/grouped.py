"""Linear layers of several experts in one grouped product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(rows: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    """Each expert's rows times its weight: rows [m, d_in] and weight [E, d_out, d_in] give [m, d_out].

    per_expert: rows of each expert; rows are grouped by expert, and the counts sum to m.

    One grouped product where torch supports it (rows of a multiple of 16 bytes, not float64), else a product
    for each expert. The weight of an expert without rows is in the graph too, so every rank reduces the same
    gradients.
    """
    # The grouped product, and its gradient, leave rows after the last expert's end uninitialised.
    assert rows.shape[0] == sum(per_expert), (rows.shape, per_expert)
    aligned = all(n * rows.element_size() % 16 == 0 for n in weight.shape[1:])
    if rows.dtype != torch.float64 and aligned and rows.shape[0]:
        ends = torch.tensor(per_expert, device=rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    parts = torch.split(rows, per_expert)
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight.unbind(0), strict=True)])
