"""Jobs whose expert exchanges run beside the computation of another micro-batch."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import mm.train.step
from mm.train.step import run_step
from parallel.schedule import Record, execute
from tests.mm.harness import largest_difference, running, small, train_few
from tests.slow import on_demand

WEIGHTS = {"aux_weight": 0.7, "z_weight": 0.3, "mtp_weight": 0.9, "mtp_layers": 1}
Job = tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]  # layout, micro-batches, train, model.llm
JOBS: dict[str, Job] = {
    # Some ranks have no samples in some micro-batches. The exchanges of layers computed again take turns too.
    "ragged and recomputed, with objectives": (
        {"vision": {"ranks": "0-1"}, "llm": {"ep": 4, "data_parallel": "step"}},
        3,
        {"global_batch": 5, "recompute": True, "shard": "layer"},
        {**WEIGHTS, "pattern": "EE"},
    ),
    "pp2, features of experts over ranks": (
        {"llm": {"ranks": [2, 0, 3, 1], "pp": 2, "etp": 2, "data_parallel": "zero2"}},
        4,
        {},
        {},
    ),
    "virtual stages, tokens gathered": (
        {"llm": {"pp": 2, "vpp": 2, "ep": 2, "data_parallel": "zero1"}},
        5,
        {"offload": 1 << 10},
        {"pattern": "EM*E", "dispatcher": "all_gather"},
    ),
}
LEARNT = ("loss", "grad_norm_by_module", "objectives")


def one_after_the_other(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Metrics of the same plan where the two of a pair do not take turns."""

    def apart(actions: Any, handlers: Any, *, observe: Any, starting: Any, together: Any) -> Any:
        return execute(actions, handlers, observe=observe, starting=starting)

    with mock.patch.object(mm.train.step, "execute", apart):
        return train_few(raw, steps)


RARELY = ["ragged and recomputed, with objectives", "virtual stages, tokens gathered"]


@pytest.mark.parametrize("name", on_demand(JOBS, RARELY))
def test_pairs_learn_what_one_process_learns(name: str, ranks: Any) -> None:
    layout, microbatches, train, llm = JOBS[name]
    raw = small(layout=layout, train={**train, "steps": 2})
    raw["schedule"] = {"microbatches": microbatches, "overlap_experts": True}
    alone = small(train={"global_batch": raw["train"]["global_batch"], "steps": 2})
    for config in (raw, alone):
        config["model"]["llm"].update(llm)
    expected = ranks(1, train_few, alone, 2)[0]
    got, apart = (ranks(4, fn, raw, 2, timeout=120) for fn in (train_few, one_after_the_other))
    for ours, theirs in zip(got, apart, strict=True):
        assert largest_difference(ours, expected) < 1e-9
        assert [[m[k] for k in LEARNT] for m in ours] == [[m[k] for k in LEARNT] for m in theirs]


class Watched:
    """A collective under way. log: gets its start, the end of its wait, and whether it had come before."""

    def __init__(self, work: dist.Work, log: list[tuple[float, float, bool]]) -> None:
        self.work, self.log, self.start = work, log, time.perf_counter()

    def wait(self) -> None:
        there = self.work.is_completed()
        self.work.wait()
        self.log.append((self.start, time.perf_counter(), there))


def watched(raw: dict[str, Any]) -> tuple[list[Record], list[tuple[float, float, bool]], list[str]]:
    """Records of a step, its exchanges that had company, and the threads that it left."""
    exchanges: list[tuple[float, float, bool]] = []
    records: list[Record] = []
    real = dist.all_to_all_single

    def watch(*given: Any, async_op: bool = False, **named: Any) -> Any:
        work = real(*given, async_op=async_op, **named)
        return Watched(work, exchanges) if async_op else work

    with running(raw) as (job, feed), mock.patch.object(dist, "all_to_all_single", watch):
        prepared, _ = feed.next(0, 1)
        run_step(job, prepared, train=True, observe=records.append)
        left = [t.name for t in threading.enumerate() if t.name.startswith("turns")]
    return records, exchanges, left


def test_exchanges_are_under_way_while_another_micro_batch_computes(ranks: Any) -> None:
    raw = small(layout={"llm": {"ep": 2, "data_parallel": "step"}})
    raw["schedule"] = {"microbatches": 4, "overlap_experts": True}
    raw["model"]["llm"]["pattern"] = "MEME"
    for records, exchanges, left in ranks(2, watched, raw):
        pairs = [(a, b) for a, b in itertools.pairwise(records) if a.action.paired]
        assert [(a.action.microbatch, b.action.microbatch) for a, b in pairs] == [(1, 0), (2, 1), (3, 2)]
        # Two layers have four exchanges forward and four back; the last one of a pair is left alone.
        assert len(exchanges) == 3 * (4 + 4)
        for start, end, _ in exchanges:
            assert any(a.start <= start and b.start <= end and end <= max(a.end, b.end) for a, b in pairs)
        assert sum(there for *_, there in exchanges) >= len(exchanges) / 2  # a small message, a busy machine
        assert not left
