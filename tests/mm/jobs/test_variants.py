"""The first law for jobs that differ in more than their layout: levels, frozen modules, dtypes, prediction of
multi-token prediction; and rows that break their promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from encoders.contract import Features, ItemBatch
from encoders.vit import ViT
from mm.errors import DataError
from tests.mm.harness import largest_difference, small, train_few

APART = {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": [3, 2], "tp": 2}}
MIXED = {
    "vision": {"cp": 2},
    "audio": {"ranks": "0-1"},
    "llm": {"ranks": [2, 1, 3, 0], "tp": 2, "sequence_parallel": True},
}
DEEP = {"vision": {"ranks": "0-1"}, "llm": {"ranks": [1, 3, 0, 2], "pp": 4}}
VIRTUAL = {
    "vision": {"tp": 2},
    "audio": {"ranks": "0-1"},
    "llm": {"ranks": [2, 0, 3, 1], "pp": 2, "vpp": 2, "tp": 2},
}
VIRTUAL_APART = {"vision": {"ranks": 0}, "audio": {"ranks": 3}, "llm": {"ranks": "1-2", "pp": 2, "vpp": 2}}
SHARDED = {
    "vision": {"ranks": "0-3", "pp": 2, "data_parallel": "zero2"},
    "audio": {"tp": 2, "data_parallel": "zero3"},
    "llm": {"ranks": [2, 0, 3, 1], "pp": 2},
}
PIPED = {"llm": {"pp": 2, "cp": 2}, "vision": {"ranks": [0, 2, 3, 1], "pp": 2, "tp": 2}}


def with_levels(raw: dict[str, Any]) -> None:
    raw["model"]["vision"]["options"]["levels"] = [0]
    raw["model"]["llm"]["level_layers"] = [0]


def with_levels_in_later_stages(raw: dict[str, Any]) -> None:
    raw["model"]["vision"]["options"] |= {"layers": 3, "levels": [0, 1]}
    raw["model"]["audio"]["freeze"] = "all"
    raw["model"]["llm"] |= {"level_layers": [1, 2], "pattern": "ME*-"}


def with_levels_in_any_order(raw: dict[str, Any]) -> None:
    raw["model"]["vision"]["options"] |= {"layers": 3, "levels": [0, 1]}
    raw["model"]["llm"] |= {"level_layers": [3, 0], "pattern": "ME*-"}


def with_multi_token_prediction(raw: dict[str, Any]) -> None:
    raw["data"] |= {"context": 36, "overlong": "truncate"}  # labels end where samples are truncated
    raw["model"]["llm"] |= {"mtp_layers": 2, "mtp_pattern": "*E", "aux_weight": 0.01, "z_weight": 0.01}


def with_latent_experts(raw: dict[str, Any]) -> None:
    raw["model"]["llm"] |= {"latent": 12, "expert_groups": 2, "top_groups": 1, "tied": True}


def with_frozen_vision(raw: dict[str, Any]) -> None:
    raw["model"]["vision"]["freeze"] = "all"
    raw["model"]["audio"]["freeze"] = "encoder"


def with_first_layers_frozen(raw: dict[str, Any]) -> None:
    """Of a pipeline the first stage has no weights to train, and the second some and some not."""
    raw["model"]["vision"]["options"] |= {"layers": 5, "levels": [0, 3]}
    raw["model"]["vision"]["freeze_layers"] = 4
    raw["model"]["audio"]["freeze_layers"] = 1
    raw["model"]["llm"] |= {"level_layers": [1, 2], "pattern": "ME*-"}
    raw["train"]["recompute"] = ["full"]


def with_frozen_llm(raw: dict[str, Any]) -> None:
    raw["model"]["llm"]["freeze"] = True


VARIANTS = [
    with_levels,
    with_levels_in_later_stages,
    with_levels_in_any_order,
    with_multi_token_prediction,
    with_latent_experts,
    with_frozen_vision,
    with_frozen_llm,
    with_first_layers_frozen,
]

LAYOUTS = {
    with_first_layers_frozen: [MIXED, PIPED, DEEP, SHARDED],
    with_levels_in_later_stages: [APART, MIXED, PIPED, DEEP, VIRTUAL_APART],
    with_levels_in_any_order: [DEEP, VIRTUAL],
}


@pytest.mark.slow  # test_reference.py has multi-token prediction in fewer layouts
@pytest.mark.parametrize("change", VARIANTS, ids=lambda f: f.__name__)
def test_variants_learn_what_one_process_learns(change: Any, ranks: Any) -> None:
    def raw(**sections: Any) -> dict[str, Any]:
        out = copy.deepcopy(small(**sections))
        change(out)
        return out

    expected = ranks(1, train_few, raw(), 2)[0]
    for layout in LAYOUTS.get(change, [APART, MIXED, PIPED, DEEP]):
        got = ranks(4, train_few, raw(layout=layout, schedule={"microbatches": 2}), 2)
        assert largest_difference(got[0], expected) < 1e-9, layout
        if change is with_frozen_vision and layout is APART:
            # One direction only: the rows of each micro-batch go to both of tp's ranks, nothing comes back.
            learns = ranks(4, train_few, small(layout=layout, schedule={"microbatches": 2}), 1)[0][0]
            assert (
                0 < got[0][0]["boundary"]["vision"]["bytes"] * 3 == learns["boundary"]["vision"]["bytes"] * 2
            )


@pytest.mark.slow
def test_in_bfloat16_the_loss_curve_is_that_of_one_process(ranks: Any) -> None:
    train = {"steps": 8, "dtype": "bfloat16", "lr": 1e-2, "warmup": 0.0}
    exact = ranks(1, train_few, small(train=train | {"dtype": "float32"}), 8)[0]
    alone = ranks(1, train_few, small(train=train), 8)[0]
    assert alone[-1]["loss"] < 0.4 * alone[0]["loss"]  # it learns
    for layout in (MIXED, PIPED):
        got = ranks(4, train_few, small(train=train, layout=layout, schedule={"microbatches": 2}), 8)[0]
        for other in (alone, exact):
            away = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(got, other, strict=True)]
            assert max(away) < 0.05 and sum(away) / len(away) < 0.02, (layout, away)


class Careless(ViT):
    """Leaves out the last row."""

    def forward(self, batch: ItemBatch, *args: Any) -> Any:
        found = super().forward(batch, *args)
        assert isinstance(found, Features)
        return Features(found.values[:-1], (*found.rows[:-1], found.rows[-1] - 1))


def break_promise() -> str:
    raw = small()
    raw["model"]["vision"]["encoder"] = "tests.mm.jobs.test_variants:Careless"
    try:
        train_few(raw, 1)
    except DataError as error:
        return str(error)
    return "no error"


def test_rows_that_do_not_match_their_placeholders_name_the_sample(ranks: Any) -> None:
    message = ranks(1, break_promise)[0]
    assert message.startswith("module vision, sample ") and "Careless gave" in message
