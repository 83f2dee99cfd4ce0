"""Moves tokens to the ranks of their experts and back: by all-to-all, by all-gather, between expert slices.

The router's choice of experts and the experts themselves may not enter: both are in llm.

    route = plan_route(chosen, n_experts, axes.ep)     routing.py: exchanges row counts, once a layer
    rows = dispatch(x, route)                          all_to_all.py: rows to this rank's experts
    out = grouped_linear(rows, w, route.experts)       grouped.py: all experts in one product
    y = combine(out, weight, route)                    all_to_all.py: back to the tokens, weighted and summed

all_gather.py does the same with plan_gather(), gather_dispatch() and gather_combine(). expert_tensor.py
surrounds the experts with gather_rows() and reduce_rows() where etp shards each expert's features.
"""

from parallel.expert_parallel.all_gather import GatherRoute, gather_combine, gather_dispatch, plan_gather
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.expert_tensor import gather_rows, reduce_rows
from parallel.expert_parallel.grouped import ExpertRows, grouped_linear
from parallel.expert_parallel.routed import routed_tokens
from parallel.expert_parallel.routing import (
    EtpRows,
    Route,
    Table,
    capacity_rows,
    etp_rows,
    exchange_tokens,
    plan_route,
    tally,
    within_capacity,
)

__all__ = [
    "EtpRows",
    "ExpertRows",
    "GatherRoute",
    "Route",
    "Table",
    "capacity_rows",
    "combine",
    "dispatch",
    "etp_rows",
    "exchange_tokens",
    "gather_combine",
    "gather_dispatch",
    "gather_rows",
    "grouped_linear",
    "plan_gather",
    "plan_route",
    "reduce_rows",
    "routed_tokens",
    "tally",
    "within_capacity",
]
