"""What a job sends: every row to each rank that reads it, once, and its gradient back, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm.config.outline import SINK
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.plan.step_plan import ItemPlan
from mm.ranks.feed import prepare
from mm.ranks.job import build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.step import run_step
from parallel.comm.pipeline import Pipe
from parallel.topology.layout import Layout
from tests.mm.harness import CONFIGS, small
from tests.parallel.boundary.counter import Counter

ITEM = 8  # bytes of a float64


def counted(raw: dict[str, Any], node_size: int | None) -> dict[str, int]:
    """Bytes that this rank handed to others in one step and, counted from the plan alone, the least that
    all ranks together must send: of rows and their gradients, of these between nodes, and along pipelines."""
    world, rank = dist.get_world_size(), dist.get_rank()
    blueprint = draw_up(from_mapping(raw, CONFIGS), world)
    job = build_job(blueprint, RankInfo(rank, world, torch.device("cpu"), node_size=node_size))
    piped = [0]
    send = Pipe.send

    def count(self: Pipe, x: torch.Tensor, peer: int, tag: int) -> None:
        piped[0] += x.numel() * x.element_size()
        send(self, x, peer, tag)

    data = open_data(job, open_index(blueprint, blueprint.cfg.data.train, CONFIGS))
    # One sample comes three times: of two micro-batches, one reads the same rows at two places.
    same, *others = data.index.samples[: blueprint.cfg.train.global_batch - 2]
    prepared = prepare(0, [same, same, *others, same], data.assembler)
    Pipe.send = count  # type: ignore[method-assign]
    try:
        with Counter(node_size or world) as counter:
            run_step(job, prepared, train=True)
    finally:
        Pipe.send = send  # type: ignore[method-assign]
        data.assembler.reader.close()
        job.close()
    received = sum(sum(s.stats.bytes_received.values()) for both in job.boundaries.values() for s in both)
    out = {"rows": counter.bytes, "crossing": counter.crossing, "piped": piped[0], "received": received}
    llm, stages = blueprint.layouts[SINK], blueprint.stages
    out |= {"least rows": 0, "least crossing": 0, "least piped": 0}
    width = blueprint.llm.d_model * ITEM
    for mb in prepared.plan.microbatches:
        out["least piped"] += 2 * sum(mb.tokens) * (len(stages[SINK]) - 1) * width * llm.tp
        for name, use in blueprint.inputs.encoders.items():
            for item in once(mb.edges[name].items):
                for level in range(use.cls.feature_levels(use.cfg)):
                    after = blueprint.llm.level_layers[level - 1] if level else 0
                    at = next(i for i, s in enumerate(stages[SINK]) if after in s.layers) % llm.pp
                    have, read = holders(use.layout, item), readers(llm, item, at)
                    learns = name not in blueprint.frozen
                    copies = len(read - have) + learns * len(have - read)
                    n = node_size or world
                    over = len(nodes(read, n) - nodes(have, n)) + learns * len(
                        nodes(have, n) - nodes(read, n)
                    )
                    out["least rows"] += item.rows * width * copies
                    out["least crossing"] += item.rows * width * over
    return out


def once(items: Iterable[ItemPlan]) -> Iterator[ItemPlan]:
    """The items, those of one payload and one reader once."""
    seen = set()
    for item in items:
        key = item.part.sha256, item.llm_dp
        if key not in seen:
            yield item
        seen.add(key)


def holders(layout: Layout, item: ItemPlan) -> set[int]:
    return {layout.rank_at(tp=t, dp=item.source_dp, pp=layout.pp - 1) for t in range(layout.tp)}


def readers(layout: Layout, item: ItemPlan, pp: int) -> set[int]:
    return {layout.rank_at(tp=t, dp=item.llm_dp, pp=pp) for t in range(layout.tp)}


def nodes(ranks: set[int], node_size: int) -> set[int]:
    return {r // node_size for r in ranks}


def job(layout: dict[str, Any], *, levels: bool, **model: Any) -> dict[str, Any]:
    raw = small(layout=layout, schedule={"microbatches": 2}, train={"global_batch": 6})
    if levels:
        raw["model"]["vision"]["options"] |= {"layers": 3, "levels": [0, 1]}
        raw["model"]["llm"] |= {"level_layers": [2, 1]}
    raw["model"]["audio"] |= model
    return raw


CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "each level to its stage": ({"vision": {"ranks": "0-1"}, "audio": {"ranks": 3}, "llm": {"pp": 4}}, None),
    "virtual stages, tp": ({"vision": {"ranks": "0-1"}, "llm": {"pp": 2, "vpp": 2, "tp": 2}}, None),
    "nodes, stages": (
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "2-3", "tp": 2}, "llm": {"pp": 2, "tp": 2}},
        2,
    ),
    "nodes, tp over both": ({"vision": {"ranks": "0-1"}, "audio": {"tp": 2}, "llm": {"tp": 4}}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_every_level_of_every_row_is_sent_where_it_is_read_once(case: str, ranks: Any) -> None:
    layout, node_size = CASES[case]
    found = ranks(4, counted, job(layout, levels=True, freeze="all" if "tp" in case else "none"), node_size)
    for what in ("rows", "crossing", "piped"):
        assert sum(f[what] for f in found) == found[0][f"least {what}"], what
    assert sum(f["received"] for f in found) == found[0]["least rows"] > 0
    assert (found[0]["least crossing"] > 0) == (node_size is not None)
