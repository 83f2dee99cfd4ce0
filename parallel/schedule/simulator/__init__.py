"""A plan in time: what its actions cost, and when each of them begins and ends.

Measured times may enter only as records, from which costs are taken.
"""

from parallel.schedule.simulator.costs import Costs, measured_costs
from parallel.schedule.simulator.simulate import Timeline, simulate

__all__ = [
    "Costs",
    "Timeline",
    "measured_costs",
    "simulate",
]
