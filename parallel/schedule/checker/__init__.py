"""Proofs about a plan without running it: complete, in order, free of deadlock, within a bound of memory.

graph.py says what waits for what, for the simulator too. Durations may not enter.
"""

from parallel.schedule.checker.check import PlanError, check
from parallel.schedule.checker.graph import Graph, graph_of
from parallel.schedule.checker.memory import Memory, Peak, check_limit, peaks
from parallel.schedule.checker.order import Stuck

__all__ = [
    "Graph",
    "Memory",
    "Peak",
    "PlanError",
    "Stuck",
    "check",
    "check_limit",
    "graph_of",
    "peaks",
]
