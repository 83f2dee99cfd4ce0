"""Which ranks a module lives on, what each of them holds, and the process groups between them.

Layouts and stages are pure and need no torch; groups are made in mesh.py, which is imported on its own
(`from parallel.topology.mesh import build_mesh`). Nothing that moves a tensor may enter.
"""

from parallel.topology.axis import Axes, Axis
from parallel.topology.directions import Directions
from parallel.topology.groups import WORLD, Group, GroupPlan, group_plan
from parallel.topology.layout import Coord, ExpertCoord, Layout, Unfit, make_layout, nearest_degrees
from parallel.topology.stage import Stage, partition_layers, stages_of, whole

__all__ = [
    "WORLD",
    "Axes",
    "Axis",
    "Coord",
    "Directions",
    "ExpertCoord",
    "Group",
    "GroupPlan",
    "Layout",
    "Stage",
    "Unfit",
    "group_plan",
    "make_layout",
    "nearest_degrees",
    "partition_layers",
    "stages_of",
    "whole",
]
