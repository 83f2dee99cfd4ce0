"""A plan in time: what its actions cost, and when each of them begins and ends.

Real clocks enter only as records that costs are measured from.
"""

from parallel.schedule.simulator.costs import Costs, measured_costs
from parallel.schedule.simulator.simulate import Timeline, simulate

__all__ = [
    "Costs",
    "Timeline",
    "measured_costs",
    "simulate",
]
