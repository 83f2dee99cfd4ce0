"""Token dispatch by all-gather: every rank of ep sees all tokens and computes those of its own experts.

It moves each token to every rank. That pays where a token chooses about as many experts as there are ranks,
or where the network is slow with many small messages. The other dispatcher is in all_to_all.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.comm.collectives import gather_tokens, reduce_tokens
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.grouped import ExpertRows
from parallel.expert_parallel.routing import EtpRows, Route, plan_route
from parallel.topology.axis import Axis


@dataclass(frozen=True)
class GatherRoute:
    """Which tokens of all ranks go to this rank's experts.

    axis: the expert-parallel axis.
    widest: the largest number of tokens on any rank; every rank pads its tokens to it for the exchange.
    own: the route, without communication, from the padded tokens of all ranks to this rank's experts.
    """

    axis: Axis
    widest: int
    own: Route

    @property
    def experts(self) -> ExpertRows:
        """Rows of each local expert."""
        return self.own.experts

    @property
    def etp(self) -> EtpRows | None:
        """The rows that meet in this rank's slices of its experts."""
        return self.own.etp


def plan_gather(
    expert: Tensor,
    n_experts: int,
    axis: Axis,
    tokens: Sequence[int],
    *,
    etp: Axis | None = None,
    keep: Tensor | None = None,
) -> GatherRoute:
    """The route of n tokens to their chosen experts; collectives over `axis` and etp, with one host wait.

    expert: int64 [n, k], the chosen experts. n may differ between ranks.
    tokens: n of each rank of `axis`.
    etp, keep: as in plan_route().
    """
    widest = max(tokens)
    if keep is not None:
        expert = torch.where(keep, expert, n_experts)
    padded = F.pad(expert, (0, 0, 0, widest - expert.shape[0]), value=n_experts)
    everyone = gather_tokens(padded, axis)  # [size * widest, k]
    local = n_experts // axis.size
    here = everyone - axis.rank * local
    falls_here = (here >= 0) & (here < local)
    own = plan_route(here.clamp(0, local - 1), local, Axis.single("ep"), etp=etp, keep=falls_here)
    return GatherRoute(axis, widest, own)


def gather_dispatch(x: Tensor, route: GatherRoute) -> Tensor:
    """Tokens [n, d] to the rows of this rank's experts [m, d], grouped by expert; a collective."""
    padded = F.pad(x, (0, 0, 0, route.widest - x.shape[0]))
    return dispatch(gather_tokens(padded, route.axis), route.own)


def gather_combine(rows: Tensor, weight: Tensor, route: GatherRoute) -> Tensor:
    """Expert outputs [m, d] to tokens [n, d], summed with the router's weights [n, k]; two collectives."""
    n = weight.shape[0]
    everyone = gather_tokens(F.pad(weight, (0, 0, 0, route.widest - n)), route.axis)
    return reduce_tokens(combine(rows, everyone, route.own), route.axis)[:n]
