"""Pictures of a step, simulated or measured, as SVG or PNG, and its trace for Perfetto.

A picture is a list of shapes. Drawing may not change what it draws.
"""

from parallel.schedule.drawing.chart import Chart, measured, simulated
from parallel.schedule.drawing.draw import draw
from parallel.schedule.drawing.save import save
from parallel.schedule.drawing.trace import save_trace

__all__ = [
    "Chart",
    "draw",
    "measured",
    "save",
    "save_trace",
    "simulated",
]
