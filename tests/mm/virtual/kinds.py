"""`python -m tests.mm.virtual.kinds`: a job of 16 ranks on nodes of four, one rank of each kind traced.

Its traces are matched as they are, then with one call of one rank changed. In a process of its own, since the
virtual accelerator has to be there before the first backward.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from mm.config.schema import from_mapping
from mm.plan.blueprint import Blueprint, draw_up
from mm.virtual import accelerator, virtual_data, virtual_rank
from mm.virtual.programs import kinds_of, match_kinds, twins_of
from mm.virtual.records import Trace
from mm.virtual.run import first_plan
from tests.mm.harness import CONFIGS, small
from tests.mm.virtual.changes import changes

LAYOUT = {
    "vision": {"tp": 2},
    "audio": {"ranks": "0-7"},
    "llm": {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True},
}


def drawn_up(layout: dict[str, Any], **llm: Any) -> Blueprint:
    raw = small(
        layout=layout,
        schedule={"microbatches": 2},
        train={"dtype": "bfloat16", "global_batch": 16},
        data={"train": ["nowhere/*.tar"], "context": 128},
        run={"node_size": 4},
    )
    raw["model"]["llm"] |= llm
    return draw_up(from_mapping(raw, CONFIGS), 16)


def waits(trace: Trace) -> list[tuple[str, str, int]]:
    """Where the host waited for the device, how often."""
    return [(w.phase, w.file, w.count) for w in trace.host_waits]


def main() -> None:
    """Print host waits, calls across nodes, what is found of the job, and which changes are not."""
    blueprint = drawn_up(LAYOUT)
    device = accelerator()
    data = virtual_data(blueprint, even=True)
    plan = first_plan(blueprint, data.index)
    kinds = list(kinds_of(blueprint, plan).values())
    chosen = [r for ranks in kinds for r in (ranks[0], *twins_of(ranks, 1, 0))]
    traces = [virtual_rank(blueprint, r, device, data=data) for r in chosen]

    def problems(changed: list[Trace]) -> list[str]:
        return match_kinds(blueprint, plan, kinds, changed).problems

    missed = []
    rng = np.random.default_rng(0)
    for n in range(2):  # the first rank of a kind, and its twin
        others = [*changes(traces[n], rng), *_edges(traces[n])]
        for k, other in enumerate(others):
            if not problems([*traces[:n], other, *traces[n + 1 :]]):
                missed.append((n, k))
    # With room for all rows, so that nothing is dropped.
    padded = drawn_up({**LAYOUT, "llm": {"cp": 2, "etp": 2}}, capacity=8.0, pad_experts=True)
    found: dict[str, Any] = {
        "kinds": [len(ranks) for ranks in kinds],
        "problems": problems(traces),
        "missed": missed,
        "changes": 2 * len(others),
        "waits": waits(traces[0]),
        "padded": waits(virtual_rank(padded, 0, device, data=virtual_data(padded))),
        "crossing": sum(c.crosses_nodes for t in traces for c in t.calls),
        "hops": [sum(c.group.startswith("edge.") for c in t.calls) for t in traces],
        "sums": [sum(map(len, t.sums.values())) for t in traces],
    }
    print(json.dumps(found))


def _edges(trace: Trace) -> list[Trace]:
    """The trace with a call over an edge that moves other rows, and with the update's sum of another size."""
    out = []
    for k, c in enumerate(trace.calls):
        if (c.group.startswith("edge.") and any(c.sends)) or (c.during == "update" and c.group in trace.sums):
            sends = (
                tuple(reversed(c.sends))
                if c.sends != tuple(reversed(c.sends))
                else tuple(2 * n for n in c.sends)
            )
            other = replace(c, sends=sends, bytes=c.bytes + 4)
            out.append(replace(trace, calls=(*trace.calls[:k], other, *trace.calls[k + 1 :])))
    return out


if __name__ == "__main__":
    main()
