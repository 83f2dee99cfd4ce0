"""A measured run as a trace file for chrome://tracing and Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.schedule.record import Record


def trace_events(records: Mapping[int, Sequence[Record]]) -> dict[str, Any]:
    """Trace Event Format: a process for each rank, a thread for each module, times in microseconds.

    The clocks of the ranks must agree, as they do on one machine.
    """
    first = min((r[0].start for r in records.values() if r), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, run in sorted(records.items()):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        threads = {m: k for k, m in enumerate(dict.fromkeys(r.action.module for r in run))}
        for module, thread in threads.items():
            events.append(
                {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": module}}
            )
        for action, start, end, ready in run:
            waited = 1e6 * (ready - start)
            events.append(
                {
                    "ph": "X",
                    "name": str(action),
                    "cat": action.kind.value,
                    "pid": rank,
                    "tid": threads[action.module],
                    "ts": 1e6 * (start - first),
                    "dur": 1e6 * (end - start),
                    "args": {
                        "stage": action.stage,
                        "microbatch": action.microbatch,
                        "waited_us": waited,
                        "groups": [str(g) for g in action.groups],
                    },
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_trace(records: Mapping[int, Sequence[Record]], path: Path) -> None:
    """Write the trace of a run as JSON."""
    path.write_text(json.dumps(trace_events(records)))
