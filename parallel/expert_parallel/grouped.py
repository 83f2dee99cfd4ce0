"""Linear layers of several experts in one grouped product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes: the rows of a grouped product's operands are multiples of it


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """How many rows each of this rank's experts has. Rows are grouped by expert.

    counts: int64 [E], on the device, which is where grouped products read them.
    total: their sum, which sizes tensors.
    """

    counts: Tensor
    total: int

    @cached_property
    def ends(self) -> Tensor:
        """Where the rows of each expert end, int32 [E]; made once for all products of a layer."""
        return self.counts.cumsum(0, dtype=torch.int32)

    @cached_property
    def listed(self) -> list[int]:
        """The counts on the host, which waits for the device the first time."""
        out: list[int] = self.counts.tolist()
        return out


def grouped_linear(rows: Tensor, weight: Tensor, experts: ExpertRows) -> Tensor:
    """Each expert's rows times its weight: rows [m, d_in] and weight [E, d_out, d_in] give [m, d_out].

    experts: rows of each expert, m in all.

    One grouped product, which reads the rows' ends on the device; rows that are no multiple of 16 bytes are
    widened by zeros for it. Where torch has no kernel for it, it makes the host wait (docs/llm.md). In
    float64, which it lacks, there is a product for each expert, with a host wait on accelerators: that is for
    comparisons, not for training. The weight of an expert without rows is in the graph too, so every rank
    reduces the same gradients.
    """
    # The grouped product, and its gradient, leave rows after the last expert's end uninitialised.
    assert rows.shape[0] == experts.total, (rows.shape, experts.total)
    if rows.dtype == torch.float64 or not experts.total:
        per_expert = experts.listed if experts.total else [0] * len(weight)
        parts = torch.split(rows, per_expert)
        return torch.cat([F.linear(x, w) for x, w in zip(parts, weight.unbind(0), strict=True)])
    unit = ALIGNMENT // rows.element_size()
    more_out, more_in = (-n % unit for n in weight.shape[1:])
    if more_in:
        rows = F.pad(rows, (0, more_in))
    if more_in or more_out:
        weight = F.pad(weight, (0, more_in, 0, more_out))
    out = F.grouped_mm(rows, weight.transpose(-2, -1), offs=experts.ends)
    return out.narrow(1, 0, out.shape[1] - more_out) if more_out else out
