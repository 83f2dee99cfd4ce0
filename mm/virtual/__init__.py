"""A rank of any job without hardware: its real code, one step, on fake tensors and fake process groups.

    blueprint = draw_up(cfg, world=1024)
    trace = virtual_rank(blueprint, 0, accelerator(), data=virtual_data(blueprint))

run.py builds the rank and runs its step. recorder.py sees every operation: ledger.py follows memory, calls.py
collectives and messages, kernels.py what computes, waits.py where the host waits. values.py gives the few
integers that decide something (which expert, how many rows) values of their own; samples.py makes up data
where there is none. match.py runs the traces of all ranks against each other, programs.py those of one rank
of each kind in place of all.

What does not follow from shapes is not here: time, the allocator's rounding, kernels that a library picks.
"""

from mm.virtual.accelerator import accelerator
from mm.virtual.match import match
from mm.virtual.programs import match_all, match_representatives
from mm.virtual.records import Trace
from mm.virtual.run import virtual_rank
from mm.virtual.samples import virtual_data

__all__ = [
    "Trace",
    "accelerator",
    "match",
    "match_all",
    "match_representatives",
    "virtual_data",
    "virtual_rank",
]
