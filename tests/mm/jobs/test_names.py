"""A module may have any name: it is never taken for a metric, a group, a part of a sample or a section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.commands.dry_run import dry_run
from mm.config.schema import from_mapping, load_config, resolve_yaml
from mm.data.index import load_index
from mm.data.sample import parse_segments
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from mm.plan.subsets import Subset
from mm.train.rank_report import EdgeReport, LayerReport, ModuleReport, Report, Scalars
from parallel.topology.groups import WORLD, Group
from tests.mm.harness import CONFIGS, largest_difference, small, train_few
from tests.mm.shards import npy, sensor_samples, write_shard

NAMES = ("stop", "loss", "sync", "memory", "edge", "text2", "optimizer", "world", "depends", "adam", "ranks")


def named(folder: Path, layout: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config with a tiny encoder of each name, over samples with an item of each."""
    samples = sensor_samples(6, module=NAMES[0])
    for sample in samples:
        sample["parts"] = {"sen.npy": npy(np.full((5, 3), 0.1 * len(sample["key"])))}
        sample["segments"] = [{name: "sen.npy"} for name in NAMES] + [
            {"text": "level "},
            {"text": "7", "depends": "loss"},
        ]
    write_shard(folder / "named-0.tar", samples)
    raw = small(
        data={"train": [str(folder / "named-*.tar")]},
        train={"global_batch": 4, "steps": 2},
        run={"dir": str(folder / "run"), "trace": 1},
        layout=layout or {},
    )
    one = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 4}}
    raw["model"] = {**{name: one | {"options": {"width": 4}} for name in NAMES}, "llm": raw["model"]["llm"]}
    return raw


@pytest.mark.slow
def test_encoders_called_as_metrics_groups_and_keys_train_as_any_other(ranks: Any, tmp_path: Path) -> None:
    alone = ranks(1, train_few, named(tmp_path), 2)[0]
    layout = {"stop": {"tp": 2}, "edge": {"ranks": 1}, "world": {"ranks": 0}, "llm": {"tp": 2}}
    for got in (alone, ranks(2, train_few, named(tmp_path, layout), 2)[0]):
        for record in got:
            assert record["stop"] is False and record["loss"] > 1
            assert list(record["grad_norm_by_module"]) == [*NAMES, "llm"] == list(record["flops_by_module"])
            assert all(norm > 0 for norm in record["grad_norm_by_module"].values())
            assert list(record["seconds_by_module"]) == [*NAMES, "llm"] and record["optimizer_s"] > 0
            assert list(record["boundary"]) == list(NAMES)
        assert largest_difference(got, alone) < 1e-9
    assert got[0]["boundary"]["edge"]["bytes"] > 0 == got[0]["boundary"]["stop"]["bytes"]
    trace = json.loads((tmp_path / "run" / "trace-1.json").read_text())
    assert {"forward(stop, 0)", "forward(edge, 0)"} <= {e["name"] for e in trace["traceEvents"]}


def test_they_are_planned_drawn_and_written_to_yaml(tmp_path: Path) -> None:
    raw = named(tmp_path, {"edge": {"ranks": 1}, "world": {"tp": 2}, "llm": {"pp": 2}})
    blueprint = draw_up(from_mapping(raw, CONFIGS), 2)
    out = dry_run(blueprint, tmp_path)
    assert all(f"edge {name} -> llm" in out for name in NAMES)
    again = tmp_path / "again.yaml"
    again.write_text(resolve_yaml(blueprint.cfg))
    overrides = ["model.stop.freeze=all", "layout.edge.ranks=0", "schedule.encoder_batch.loss=1"]
    assert draw_up(load_config(again, overrides), 2).frozen == {"stop"}
    plan = blueprint.schedule([set(NAMES)])
    assert plan.members(Group("module", "edge", "tp"), 1) == (1,)
    assert plan.members(Group("module", "world", "tp"), 1) == (0, 1) == plan.members(WORLD, 0)
    assert plan.members(Group("edge", "edge", direction="forward"), 0) == (0, 1)
    assert len(load_index([str(tmp_path / "named-*.tar")], CONFIGS).samples[0].items("depends")) == 1


@pytest.mark.parametrize(("name", "why"), [("text", "not text"), ("a.b", "letters, digits and _"), ("", "_")])
def test_what_is_reserved_is_refused_by_name(name: str, why: str, tmp_path: Path) -> None:
    raw = named(tmp_path)
    raw["model"] = {name: raw["model"]["stop"], "llm": raw["model"]["llm"]}
    with pytest.raises(Refused, match=f"model.{name}: no module can have this name; .*{why}"):
        draw_up(from_mapping(raw, CONFIGS), 1)


def test_an_item_of_a_module_called_as_a_key_of_text_segments() -> None:
    def kinds(*segments: Any) -> list[str]:
        return [s.kind for s in parse_segments(json.dumps({"segments": segments}).encode())]

    assert kinds({"loss": "a.npy"}, {"depends": "b.npy"}) == ["loss", "depends"]
    found = parse_segments(b'{"segments": [{"text": "a", "loss": false, "depends": "loss"}]}')[0]
    assert (found.kind, found.loss, found.depends) == ("text", False, "loss")
    for wrong in ({"loss": "a.npy", "depends": "b.npy"}, {"loss": False}, {}):
        with pytest.raises(ValueError, match="segment 0 is"):
            kinds(wrong)


def test_a_report_comes_back_from_its_numbers() -> None:
    scalars = Scalars(sync_s=2.0, memory_bytes=3.0, stop=0.0)
    edges = {"edge": EdgeReport(received_bytes=8.0, seconds=9.0)}
    layers = {("stop", "loss"): LayerReport(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)}
    modules = {"loss": ModuleReport(5.0, compute_s=7.0, waited_s=0.5), "stop": ModuleReport(6.0, 6.5, 0.0)}
    one = Report(scalars, {Subset("text", "loss"): 0.5}, modules, edges, {"mtp": 1.5}, layers)
    row = np.array(one.numbers())
    all_ranks = one.read(np.stack([row, row + 1]))
    assert len(row) == 19 and np.array_equal(all_ranks.numbers(), [[n, n + 1] for n in one.numbers()])
    assert [c.tolist() for c in all_ranks.scalars] == [[2.0, 3.0], [3.0, 4.0], [0.0, 1.0]]
    assert {m: x.squares[1] for m, x in all_ranks.modules.items()} == {"loss": 6.0, "stop": 7.0}
    assert all_ranks.edges["edge"].seconds[1] == 10.0 and all_ranks.objectives["mtp"][1] == 2.5
    assert all_ranks.losses["text", "loss"].tolist() == [0.5, 1.5]
    assert all_ranks.layers["stop", "loss"].largest.tolist() == [6.0, 7.0]
