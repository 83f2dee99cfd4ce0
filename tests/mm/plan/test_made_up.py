"""Samples made up as data.synthetic says, and what is recomputed of each module."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mm.config.schema import from_mapping, load_config
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from mm.plan.inputs import sample_length
from mm.plan.made_up import made_up_index
from tests.mm.harness import CONFIGS, small
from tests.slow import on_demand

PUBLISHED = sorted(p.stem for p in (CONFIGS / "published").glob("*.yaml"))


def synthetic(**given: Any) -> dict[str, Any]:
    return small(data={"context": 64, "synthetic": given}, train={"global_batch": 6})


@pytest.mark.parametrize("name", on_demand(PUBLISHED, [n for n in PUBLISHED if n != "1b-7b"]))
def test_samples_of_published_runs_are_full_of_pictures_and_text(name: str) -> None:
    changes = ["data.context=65536", "data.synthetic.length=32768", "data.synthetic.items.vision.rows=512"]
    blueprint = draw_up(
        load_config(CONFIGS / "published" / f"{name}.yaml", [*changes, "train.global_batch=3"]), 64
    )
    items = blueprint.cfg.data.synthetic.items["vision"]  # type: ignore[union-attr]
    samples = made_up_index(blueprint).samples
    assert [sample_length(s, blueprint.inputs) for s in samples] == [32768] * 3
    for sample in samples:
        rows = Counter(blueprint.inputs.rows("vision", part) for part in sample.items("vision"))
        assert rows == {512: items.count}


def test_made_up_samples_hold_what_is_asked_for_of_every_encoder() -> None:
    raw = synthetic(items={"vision": {"count": 2, "rows": 16}, "audio": {"count": 1, "rows": 9}})
    blueprint = draw_up(from_mapping(raw, CONFIGS), 2)
    index = made_up_index(blueprint)
    assert len(index.samples) == 6 and not index.skipped
    for sample in index.samples:
        assert sample_length(sample, blueprint.inputs) == 64
        for module, rows in {"vision": [16, 16], "audio": [9]}.items():
            assert [blueprint.inputs.rows(module, part) for part in sample.items(module)] == rows


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": 65}, "nearest: data.context=65"),
        ({"items": {"visoin": {"count": 1, "rows": 4}}}, "did you mean vision?"),
        ({"items": {"vision": {"count": 1, "rows": 62}}}, "at most 61"),
        ({"items": {"vision": {"count": 2, "rows": 15}}}, "nearest: data.synthetic.items.vision.rows=9"),
    ],
)
def test_what_cannot_be_made_up_is_refused_with_what_can(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        made_up_index(draw_up(from_mapping(synthetic(**given), CONFIGS), 2))


def test_each_module_recomputes_what_is_asked_of_it() -> None:
    from mm.config.training import recomputed

    raw = small(train={"recompute": {"vision": True, "llm": ["mlp", "norm"]}})
    train = from_mapping(raw, CONFIGS).train
    found = {m: recomputed(train, m) for m in ("vision", "audio", "llm")}
    assert found == {"vision": {"full"}, "audio": set(), "llm": {"mlp", "norm"}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"visoin": True}, "did you mean vision?"),
        ({"vision": ["mlp"]}, "nearest: train.recompute.vision=true"),
        ({"llm": "mlpp"}, "did you mean mlp?"),
    ],
)
def test_what_no_module_can_recompute_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        from_mapping(small(train={"recompute": given}), CONFIGS)
