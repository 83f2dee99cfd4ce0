"""What ranks say of a step to come: with a message that goes anyway, or with one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from mm.order.stream import Stream
from mm.plan.batches import Batches
from mm.ranks.control import notice
from tests.host_waits import HostWaits
from tests.mm.harness import running, small
from tests.mm.plan.test_select import sample
from tests.mm.shards import write_shard

STEPS, BATCH, SAMPLES = 6, 4, 30
MEETS = 3  # the step in which a broken sample would come


def fed(shard: str, ready: list[list[bool]], workers: int) -> list[tuple[tuple[int, ...], int]]:
    """By step, its samples and the messages before it. ready: by step from 1 on, which ranks have prepared it
    when the step before ends."""
    data = {"train": [shard], "max_skipped": 1.0, "workers": workers}
    raw = small(data=data, train={"global_batch": BATCH})
    found = []
    with running(raw) as (job, feed):
        for step in range(STEPS):
            with HostWaits() as waits:
                prepared, _ = feed.next(step, STEPS)
            found.append((prepared.plan.sample_ids, len(waits.places)))
            if step + 1 < STEPS:
                feed._pending[step + 1].result()
                mine = feed.notice(step + 1) if ready[step][dist.get_rank()] else notice(None, ())
                feed.hear(step + 1, job.control.gather(mine))
        assert len(feed.bad) == 1, feed.bad
        # Nobody says anything of a step that does not come.
        assert feed.notice(STEPS) == notice(None, ())
    return found


def test_a_step_that_all_ranks_have_prepared_needs_no_message(ranks: Any, tmp_path: Path) -> None:
    samples = [sample(f"s{k:02d}", "word", (8, 8)) for k in range(SAMPLES)]
    batches = Batches(Stream.whole(1, SAMPLES), BATCH)
    broken = int(batches.ids(MEETS)[0])
    parts = samples[broken]["parts"]
    parts["i0.png"] = parts["i0.png"][:-24]  # its size can be read still
    shard = write_shard(tmp_path / "a-0.tar", samples)
    # One rank alone finds the broken sample.
    for workers, late in enumerate(({}, {MEETS: [True, False]}, {STEPS - 1: [False, False]})):
        ready = [late.get(step, [True, True]) for step in range(1, STEPS)]
        one, other = ranks(2, fed, str(shard), ready, workers)
        assert one == other
        for step, (ids, messages) in enumerate(one):
            known = frozenset({broken}) if step >= MEETS else frozenset()
            assert ids == tuple(batches.ids(step, known).tolist())
            # Where a sample is broken ranks tell each other why, in two messages, and agree once more.
            assert messages == (step == 0 or step in late) + 3 * (step == MEETS)
