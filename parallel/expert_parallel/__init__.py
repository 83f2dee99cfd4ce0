"""Tokens to the ranks of their experts and back: by all-to-all, by all-gather, and over slices of experts.

Routing decisions and experts themselves may not enter.
"""

from parallel.expert_parallel.all_gather import GatherRoute, gather_combine, gather_dispatch, plan_gather
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.grouped import grouped_linear
from parallel.expert_parallel.routing import Route, plan_route

__all__ = [
    "GatherRoute",
    "Route",
    "combine",
    "dispatch",
    "gather_combine",
    "gather_dispatch",
    "grouped_linear",
    "plan_gather",
    "plan_route",
]
