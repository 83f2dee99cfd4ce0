"""Items that are several pieces in a sequence: tiles of pictures with tags between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from encoders.vision.sizes import tiling
from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.data.order import permute_items
from mm.data.sample import Index, Sample, grouped
from mm.data.tokenizer import Tokenizer
from mm.plan.blueprint import draw_up
from mm.plan.inputs import PlanInputs, sample_length
from mm.plan.pieces import with_pieces
from mm.plan.select import select
from mm.ranks.feed import prepare
from mm.ranks.job import assembler_of
from mm.ranks.launch import RankInfo
from parallel.topology.axis import Axes
from tests.mm.harness import CONFIGS, largest_difference, small, train_few

TAGS = {"tile_tag": "<{n}>", "thumbnail_tag": "<all>"}


def tiled(**sections: Any) -> dict[str, Any]:
    """Digits of 8x8 pixels as four tiles of 4x4 and a thumbnail, a row for each square of 2x2 pixels."""
    raw = small(**sections)
    raw["data"] = {**raw["data"], "context": 192}
    raw["model"]["vision"]["encoder"] = "siglip"
    raw["model"]["vision"]["options"] = {
        "width": 24,
        "heads": 12,
        "layers": 2,
        "mlp": 48,
        "patch": 2,
        "channels": 1,
        "table": 2,
        "pictures": {"fit": "tiles", "height": 4, "width": 4, "most": 6, **TAGS},
    }
    return raw


def whole_and_in_pieces() -> tuple[Any, Index, Index]:
    blueprint = draw_up(from_mapping(tiled(), CONFIGS), 1)
    index = load_index(["data/digits-train-*.tar"], CONFIGS)
    return blueprint, index, with_pieces(index, blueprint.inputs, Tokenizer())


def texts(sample: Sample) -> list[str]:
    return [bytes(s.ids).decode() for s in sample.segments if s.ids is not None]


def test_a_picture_is_its_tiles_after_their_tags() -> None:
    blueprint, index, found = whole_and_in_pieces()
    assert found.digest == index.digest and len(found.samples) == len(index.samples)
    how, seen = blueprint.inputs.encoders["vision"].cfg.pictures, set[int]()
    for old, new in zip(index.samples[:40], found.samples[:40], strict=True):
        grids = [tiling(how, p.meta["height"], p.meta["width"]) for p in old.items("vision")]
        counts = [grid.down * grid.across for grid in grids]
        seen |= set(counts)
        tags = [[f"<{k + 1}>" for k in range(n)] + ["<all>"] for n in counts if n > 1]
        assert texts(new) == [tag for some in tags for tag in some]
        places = [k for n in counts for k in range(n + (n > 1))]
        assert [p.meta["tile"] for p in new.items("vision")] == places
        assert new.items("audio") == old.items("audio") and (counts or new == old)
        rest = sum(s.tokens for s in old.segments) + 2 + sum(map(len, texts(new)))
        rest += sum(blueprint.inputs.rows("audio", p) for p in old.items("audio"))
        assert sample_length(new, blueprint.inputs) == rest + 4 * len(places)
    assert len(seen) > 1


def test_rows_of_tiles_enter_between_tags() -> None:
    blueprint, _, found = whole_and_in_pieces()
    axes = {m: Axes() for m in blueprint.modules}
    assembler = assembler_of(blueprint, RankInfo(0, 1, torch.device("cpu")), axes)
    sample = next(s for s in found.samples if texts(s) == ["<1>", "<2>", "<3>", "<4>", "<all>"])
    micro = prepare(0, [sample], assembler).micro[0]
    assert micro.llm is not None
    ids, tok = micro.llm.ids.tolist(), Tokenizer()
    text = "".join("#" if i == tok.placeholder else chr(i) if i < 256 else "" for i in ids)
    assert "<1>####<2>####<3>####<4>####<all>####" in text
    at = text.index("<1>") + 1  # after the begin marker
    rows = micro.llm.row_positions["vision"].tolist()
    assert rows[:8] == [at + k for k in (3, 4, 5, 6, 10, 11, 12, 13)]
    labels = micro.llm.labels[at - 1 : at + 36]
    assert bool((labels < 0).all())  # neither tags nor rows are learned
    assert micro.items["vision"].lengths[:5] == (4,) * 5


def test_items_move_and_go_as_wholes() -> None:
    blueprint, _, found = whole_and_in_pieces()
    some = [s for s in found.samples if s.items("vision")][:6]
    mixed = permute_items(some, "vision", 3)
    for b in mixed:
        for group in grouped(b.segments):
            assert len({s.part.sha256 for s in group if s.part is not None}) <= 1
            tiles = [s.part.meta["tile"] for s in group if s.part is not None and s.kind == "vision"]
            assert tiles == [*range(len(tiles))]
    assert sorted(p.sha256 for s in some for p in s.items("vision")) == sorted(
        p.sha256 for s in mixed for p in s.items("vision")
    )
    for a, b in zip(some, mixed, strict=True):
        assert {p.offset for p in a.items("vision")}.isdisjoint(p.offset for p in b.items("vision"))
    short: PlanInputs = replace(blueprint.inputs, context=30, _rows={})
    rules = blueprint.cfg.data.model_copy(update={"overlong": "truncate", "max_skipped": 1.0})
    cut = select(found, short, rules)
    for s in cut.usable:
        assert sample_length(s, short) <= 30
        assert not grouped(s.segments)[-1][-1].more


def test_pieces_of_other_sizes_have_their_own_rows() -> None:
    blueprint, _, found = whole_and_in_pieces()
    part = next(s for s in found.samples if s.items("vision")).items("vision")[0]
    metas = [{"down": n, "across": 2, "piece": n} for n in (1, 3)]
    rows = [blueprint.inputs.rows("vision", replace(part, meta=meta)) for meta in metas]
    assert rows == [2, 6]


APART = {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": [3, 2], "tp": 2}}
MIXED = {"vision": {"cp": 2, "tp": 2}, "llm": {"ranks": [2, 1, 3, 0], "cp": 2, "tp": 2}}


@pytest.mark.slow
def test_layouts_learn_what_one_process_learns(ranks: Any) -> None:
    expected = ranks(1, train_few, tiled(), 2)[0]
    for layout in (APART, MIXED):
        got = ranks(4, train_few, tiled(layout=layout, schedule={"microbatches": 2}), 2)
        assert largest_difference(got[0], expected) < 1e-9, layout
