"""Linear layers of several experts in one grouped product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(rows: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    """Each expert's rows times its weight: [m, d_in], [E, d_out, d_in] -> [m, d_out].

    One grouped product where torch has it (16-byte rows, not float64), else a product per expert. Every
    expert's weight is in the graph even without rows, so that gradient reduction stays matched.
    """
    # The grouped product leaves rows past the last expert's end uninitialised, in its gradient too.
    assert rows.shape[0] == sum(per_expert), (rows.shape, per_expert)
    aligned = all(n * rows.element_size() % 16 == 0 for n in weight.shape[1:])
    if rows.dtype != torch.float64 and aligned and rows.shape[0]:
        ends = torch.tensor(per_expert, device=rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    parts = rows.split(per_expert)
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight.unbind(0), strict=True)])
