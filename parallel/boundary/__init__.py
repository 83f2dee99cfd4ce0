"""Rows from any layout to any layout, and their gradients back, with the least bytes.

source, dest = RowMap.of_items(..), RowMap.of_items(..)     # who has which rows, who wants which
plan = plan_edge("vision -> llm", source, dest, rank)       # pure
y = communicator.exchange(plan, x)                          # autograd
"""

from parallel.boundary.communicator import BoundaryCommunicator, Pending, Stats
from parallel.boundary.plan import EdgePlan, Transfer, plan_edge, plan_transfer, received_rows
from parallel.boundary.rows import RowMap

__all__ = [
    "BoundaryCommunicator",
    "EdgePlan",
    "Pending",
    "RowMap",
    "Stats",
    "Transfer",
    "plan_edge",
    "plan_transfer",
    "received_rows",
]
