"""Rows from any layout to any layout, and their gradients back, with the fewest bytes.

Plans are pure; communicator.py executes them. Models and samples may not enter: rows are numbers here.

    source = source_side(vision_layout, item_rows, item_dp)                   # who has which rows
    dest = dest_side(llm_layout, item_rows, llm_dp, item_position, tokens)    # who wants which
    plan = plan_edge("vision -> llm", source, dest, rank)                     # pure
    y = communicator.exchange(plan, x)                                        # autograd
"""

from parallel.boundary.cache import PlanCache
from parallel.boundary.communicator import BoundaryCommunicator, Stats
from parallel.boundary.plan import EdgePlan, Transfer, edge_rows, plan_edge, plan_transfer
from parallel.boundary.rows import RowMap
from parallel.boundary.sides import (
    Joint,
    dest_side,
    joint_streams,
    on_stage,
    row_counts,
    row_positions,
    sharing,
    source_side,
)
from parallel.boundary.stack import ItemColumns, Stack, own_maps, plan_stack, stack_positions
from parallel.comm.pending import Pending

__all__ = [
    "BoundaryCommunicator",
    "EdgePlan",
    "ItemColumns",
    "Joint",
    "Pending",
    "PlanCache",
    "RowMap",
    "Stack",
    "Stats",
    "Transfer",
    "dest_side",
    "edge_rows",
    "joint_streams",
    "on_stage",
    "own_maps",
    "plan_edge",
    "plan_stack",
    "plan_transfer",
    "row_counts",
    "row_positions",
    "sharing",
    "source_side",
    "stack_positions",
]
