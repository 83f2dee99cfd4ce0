"""Stages: what a list of them means, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm import cli
from mm.config.schema import Config, from_mapping
from mm.config.stages import stages_of
from mm.errors import Refused
from tests.mm.harness import CONFIGS, small
from tests.slow import on_demand

WARM = {"name": "warm", "steps": 2, "train": ["vision.projector"], "modules": ["vision"], "lr": 0.5}


def config(*stages: dict[str, Any], **sections: Any) -> Config:
    raw = small(run={"dir": "runs/x"}, **sections)
    del raw["train"]["steps"]
    return from_mapping({**raw, "stages": list(stages)}, CONFIGS)


def test_a_stage_is_the_config_with_what_is_different_in_it() -> None:
    layout = {"vision": {"tp": 2}, "audio": {"cp": 2}}
    every = {"name": "every", "steps": 3, "layout": {"vision": {"cp": 2}}, "data": {"context": 64}}
    cfg = config(WARM, every, layout=layout, train={"lr_by": {"audio": 0.1, "vision.encoder": 0.2}})
    assert cfg.train.steps == 5
    warm, rest = stages_of(cfg)
    assert (warm.name, str(warm.cfg.run.dir), warm.before) == ("warm", "runs/x/warm", ())
    assert [str(p) for p in rest.before] == ["runs/x/warm"]
    assert list(warm.cfg.model) == ["vision"] and list(rest.cfg.model) == ["vision", "audio"]
    assert warm.cfg.model["vision"].freeze == "encoder" and warm.cfg.llm["freeze"] is True
    assert warm.cfg.train.steps == 2 and warm.cfg.train.lr == 0.5 and warm.cfg.checkpoint.every == 2
    assert warm.cfg.train.lr_by == {"vision.encoder": 0.2} and warm.cfg.layout == {"vision": {"tp": 2}}
    assert rest.cfg.model["vision"].freeze == "none" and not rest.cfg.llm.get("freeze")
    assert rest.cfg.layout == {"vision": {"cp": 2}, "audio": {"cp": 2}} and rest.cfg.data.context == 64
    assert rest.cfg.train.lr == cfg.train.lr and not rest.cfg.stages
    assert [s.name for s in stages_of(cfg, "every")] == ["every"]
    alone = stages_of(from_mapping(small(), CONFIGS))
    assert len(alone) == 1 and not alone[0].name and not alone[0].before


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        (["llm"], {"vision": "all", "audio": "all", "llm": False}),
        (["vision", "audio.encoder"], {"vision": "none", "audio": "projector", "llm": True}),
        (["vision.encoder", "vision.projector", "llm"], {"vision": "none", "audio": "all", "llm": False}),
    ],
)
def test_what_a_stage_does_not_train_is_frozen(parts: list[str], frozen: dict[str, Any]) -> None:
    (stage,) = stages_of(config({"name": "a", "steps": 1, "train": parts}))
    found = {m: enc.freeze for m, enc in stage.cfg.model.items()}
    assert {**found, "llm": stage.cfg.llm["freeze"]} == frozen


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"steps": 1}], "stage 1 of stages has name None"),
        ([{"name": "../a", "steps": 1}], "needed: letters"),
        ([WARM, WARM], "warm is the name of two stages"),
        ([{"name": "a"}], "stage a: it has no steps"),
        ([{"name": "a", "steps": 1, "train": ["visoin"]}], "did you mean vision"),
        ([{"name": "a", "steps": 1, "train": []}], "train is empty"),
        ([{"name": "a", "steps": 1, "train": "llm"}], "train is 'llm'; needed: a list"),
        ([{"name": "a", "steps": 1, "modules": ["video"]}], "modules: video"),
        ([{"name": "a", "steps": 1, "learning_rate": 1}], "stage a: unknown key learning_rate"),
        ([{"name": "a", "steps": 1, "layout": 3}], "layout is 3; needed: a mapping"),
        ([{"name": "a", "steps": 1, "data": {"contxt": 3}}], "did you mean"),
        ([{"name": "a", "steps": 0}], "stage a: train.steps"),
    ],
)
def test_stages_without_a_meaning_are_refused(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(Refused) as caught:
        stages_of(config(*stages))
    assert words in str(caught.value)


def test_steps_are_those_of_the_stages() -> None:
    with pytest.raises(Refused, match="needed: steps of each stage"):
        from_mapping({**small(), "stages": [WARM]}, CONFIGS)
    with pytest.raises(Refused, match="did you mean warm"):
        stages_of(config(WARM), "wram")
    with pytest.raises(Refused, match="the config has no stages"):
        stages_of(from_mapping(small(), CONFIGS), "warm")


RECIPES = {"llava-stages": (8, 2, "Llava"), "nano-omni-stages": (64, 7, "Nemotron Omni")}


@pytest.mark.parametrize("name", on_demand(RECIPES, ["nano-omni-stages"]))
def test_published_recipes_are_planned_at_their_size(
    name: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    world, count, container = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--no-data"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"as {container}: ") == count
    assert said.count("\nfirst step: ") == count and said.count(f"\n{world} ranks\n") == count
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_made_up_samples_are_for_plans_alone(capsys: Any) -> None:
    assert cli.main(["train", str(CONFIGS / "digits.yaml"), "--no-data"]) == 2
    assert "a run needs data" in capsys.readouterr().err
