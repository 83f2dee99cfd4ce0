"""The real trainer under NCCL's rules: it learns bit for bit what it learns on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.comm.fetch import make_fetch
from parallel.topology.axis import Axis
from tests.mm.harness import small, train_few
from tests.slow import on_demand
from tests.strict.run import Hang
from tests.strict.warm import warm_up

STEPS = 2
DEEP = {"width": 24, "heads": 12, "layers": 4, "mlp": 48, "max_grid": 8}
# Layouts, and whether groups are bound to the device: in each way that is tried.
JOBS: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    "vision pp4, llm tp4": ({"vision": {"pp": 4}, "llm": {"tp": 4}}, (False, True)),
    "partly overlapping": (
        {"vision": {"ranks": "0-2"}, "audio": {"ranks": 0}, "llm": {"ranks": "1-2", "pp": 2}},
        (False,),
    ),
    "colocated dp4": ({}, (False,)),
    "llm cp4 ep4": ({"llm": {"cp": 4, "ep": 4}}, (False, True)),
    "pairs, pp2 ep2": ({"llm": {"pp": 2, "ep": 2, "data_parallel": "step"}}, (True,)),
}


def config(name: str) -> dict[str, Any]:
    raw = small(layout=JOBS[name][0], schedule={"microbatches": 3, "overlap_experts": "pairs" in name})
    raw["model"]["vision"]["options"] = DEEP  # a layer for each of four stages
    return raw


LEARNT = ("loss", "grad_norm_by_module", "objectives")


OFTEN = ("pairs, pp2 ep2",)


@pytest.mark.parametrize("name", on_demand(JOBS, [name for name in JOBS if name not in OFTEN]))
def test_a_job_learns_what_it_learns_on_gloo(name: str, ranks: Any, strict: Any) -> None:
    raw = config(name)
    on_gloo = ranks(4, train_few, raw, STEPS, timeout=120)  # the first one imports the packages
    for eager in JOBS[name][1]:
        got = strict(4, train_few, raw, STEPS, eager=eager)
        for ours, theirs in zip(got, on_gloo, strict=True):
            assert [[m[k] for k in LEARNT] for m in ours] == [[m[k] for k in LEARNT] for m in theirs]


def one_round(warm: bool) -> list[float]:
    """A round of a ring in which two of the ranks hold no rows, and what follows it."""
    rank, n = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(n)), group_desc="cp")
    if warm:
        warm_up()
    held = [[(0, 2)], [(2, 4)], [], []]
    fetch = make_fetch("keys", Axis("cp", n, rank, group), held, [[(0, 4)], [(0, 4)], [], []])
    x = torch.full((2 if rank < 2 else 0, 3), float(rank))
    got = fetch.start_round(x, 1).wait()
    home = torch.zeros_like(x)
    fetch.start_round_home(got, home, 1).wait()
    dist.barrier()
    return [*got[:, 0].tolist(), *home[:, 0].tolist()]


def test_a_round_without_rows_on_some_ranks(strict: Any) -> None:
    """As the first call of its group it waits for all members; in a group in use for its two ends."""
    text = (
        r"rank 0 waits in the host at batch\(.*\) on cp \d+ of ranks 0, 1, 2, 3 for .* come to its first use"
    )
    with pytest.raises(Hang, match=text):
        strict(4, one_round, False)
    assert len(strict(4, one_round, False, eager=True)) == 4
    for eager in (False, True):
        strict(4, one_round, True, eager=eager)
