"""The config is strict: what it does not know, or what has the wrong kind, is refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.config.build import build
from mm.config.schema import (
    Config,
    load_config,
    load_layout_file,
    resolve,
    resolve_yaml,
    with_layout,
)
from mm.errors import Refused

SHIPPED = Path(__file__).resolve().parents[3] / "configs" / "digits.yaml"
MINIMAL = """
model:
  vision: {encoder: vit}
  llm: {pattern: "M*"}
data: {train: ["a-*.tar"]}
train: {steps: 3, global_batch: 4}
"""
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def from_text(*overrides: str, text: str = MINIMAL) -> Config:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return from_text


def refusal(load: Load, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(Refused) as caught:
        load(*overrides, text=text)
    return str(caught.value)


def test_defaults_are_filled_in(load: Load) -> None:
    cfg = load()
    assert cfg.train.dtype == "float32" and cfg.schedule.kind == "auto" and cfg.checkpoint.resume == "auto"
    assert cfg.model["vision"].freeze == "none" and cfg.layout == {}


def test_the_shipped_config_loads() -> None:
    cfg = load_config(SHIPPED)
    assert sorted(cfg.model) == ["audio", "vision"] and cfg.run.nproc == 4
    assert not Path(cfg.run.dir).name.startswith(".")


def test_sections_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 5  # type: ignore[misc]


def test_overrides_are_yaml_and_the_last_one_wins(load: Load) -> None:
    cfg = load(
        "train.lr=1e-3",
        "train.recompute=true",
        "train.betas=[0.8, 0.9]",
        "layout.llm={tp: 2}",
        "run.seed=1",
        "run.seed=7",
    )
    assert cfg.train.lr == 1e-3 and cfg.train.recompute is True and cfg.train.betas == (0.8, 0.9)
    assert cfg.layout == {"llm": {"tp": 2}} and cfg.run.seed == 7


def test_overrides_reach_encoders_and_the_language_model(load: Load) -> None:
    cfg = load("model.vision.options.width=48", "model.llm.d_model=64", "model.vision.freeze=all")
    assert cfg.model["vision"].options == {"width": 48} and cfg.model["vision"].freeze == "all"
    assert cfg.llm == {"pattern": "M*", "d_model": 64}


def test_an_override_fills_a_section_that_is_empty_in_the_file(load: Load) -> None:
    assert load("eval.every=5", text=MINIMAL + "eval:\n").eval.every == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", "unknown key train.stpes; did you mean steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("trainer.optimizer.name=sgd", "unknown key trainer; did you mean train?"),
        ("colour=red", "known keys: run, model, layout, elastic, schedule, data, train, eval, checkpoint"),
        ("model.vision.encdoer=vit", "unknown key model.vision.encdoer; did you mean encoder?"),
        ("model.vision.projector.hiden=3", "unknown key model.vision.projector.hiden; did you mean hidden?"),
        ("model.visoin.freeze=all", "model.visoin.encoder is missing; did you mean model.vision?"),
        ("llm.d_model=3", "unknown key llm; did you mean model.llm?"),
        ("base=x", "unknown key base; known keys: run"),
        ("vision.options.patch=4", "unknown key vision; did you mean model.vision?"),
        ("train.LR=4", "unknown key train.LR; did you mean lr?"),
        ("train.steps=0", "train.steps: given 0; needed: greater than or equal to 1"),
        ("train.steps=true", "train.steps: given True; needed: a number"),
        ("train.lr=true", "train.lr: given True; needed: a number"),
        ("run.trace=true", "run.trace: given True; needed: a number"),
        ("run.trace=4", "run.trace is 4; needed: a step of the run, at most train.steps=3"),
        ("run.seed=-1", "run.seed: given -1"),
        ("run.dir=''", "run.dir: given ''"),
        ('run.dir="a\\nb"', r"run.dir: given 'a\nb'; needed: one line, without control characters"),
        ('run.dir="a\\0b"', r"run.dir: given 'a\x00b'; needed: text without NUL characters"),
        ('data.train=["a\\0.tar"]', "needed: text without NUL characters"),
        ("run.timeout_s=1e300", "run.timeout_s: given '1e300'; needed: less than or equal to 10000000"),
        ("checkpoint.remote.wait_s=1e300", "checkpoint.remote.wait_s: given '1e300'"),
        ("data.train=[]", "data.train: given []; needed: at least one"),
        ("train.betas=[0.9, 2]", "train.betas.1: given 2; needed: less than 1"),
        ("train.min_lr=1", "train.min_lr is 1.0; needed: at most train.lr, 0.001"),
        ("train.warmup=0.9", "needed: together at most 1; nearest: train.decay=0.1"),
        ("train.min_lr=1e-5 train.decay=0", "it would have no effect; nearest: train.min_lr=0"),
        ("train.steps=many", "train.steps: given 'many'"),
        ("train.lr=.nan", "train.lr: given nan"),
        ("train.lr=.inf", "train.lr: given inf"),
        ("train.dtype=float16", "'float64', 'float32' or 'bfloat16'"),
        ("train.betas=[0.9]", "train.betas.1 is missing"),
        ("train=3", "train: given 3; needed: a mapping"),
        ("layout.llm=", "layout.llm: given None; needed: a mapping"),
        ("train.steps.more=3", "steps is a value, not a section"),
        ("train.steps", "is not key=value"),
        ("=3", "is not key=value"),
        ("train..steps=3", "is not key=value"),
        ("train.betas=[", "is not YAML"),
    ],
)
def test_overrides_are_refused_in_words(override: str, words: str, load: Load) -> None:
    assert words in refusal(load, *re.split(" (?=train)", override))


def test_files_are_refused_in_words(load: Load, tmp_path: Path) -> None:
    assert "unknown key train.lrr; did you mean lr?" in refusal(
        load, text=MINIMAL.replace("steps: 3", "steps: 3, lrr: 1")
    )
    assert "train.steps is missing" in refusal(load, text=MINIMAL.replace("steps: 3, ", ""))
    assert "no model.llm section" in refusal(load, text="train: {steps: 3}")
    assert "cannot be read as YAML" in refusal(load, text="train: {")
    for odd in ("[" * 5000, "[" + "9" * 5000 + "]"):  # deeper, longer than Python reads
        assert "cannot be read as YAML" in refusal(load, text="train: " + odd)
    assert "not a mapping of sections" in refusal(load, text="- 3")
    assert "key train is given twice" in refusal(load, text=MINIMAL + "train: {steps: 9}\n")
    with pytest.raises(Refused, match=r"no config file .*jobs\.yaml; there: .*job\.yaml"):
        load_config(tmp_path / "jobs.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="cannot be read as YAML"):
        load_config(tmp_path / "binary.yaml")


def test_a_resolved_config_is_a_config_with_the_same_meaning(load: Load, tmp_path: Path) -> None:
    cfg = load("train.lr=3e-4", "layout.vision.tp=2", f"run.dir={tmp_path / 'runs' / 'a'}")
    again = load(text=yaml.safe_dump(resolve(cfg)))
    assert again == cfg


def test_the_config_of_a_run_finds_its_data_from_the_run_folder(load: Load, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    run_dir.mkdir(parents=True)
    cfg = load(f"run.dir={run_dir}")
    (run_dir / "config.yaml").write_text(resolve_yaml(cfg))
    again = load_config(run_dir / "config.yaml")
    assert again.train == cfg.train
    assert (again.base / again.data.train[0]).resolve() == tmp_path / "a-*.tar"


def test_with_layout_changes_the_layout_only(load: Load) -> None:
    cfg = load("layout.vision.tp=2")
    other = with_layout(cfg, {"llm": {"tp": 4}}, {"microbatches": 3})
    assert other.layout == {"llm": {"tp": 4}} and other.schedule.microbatches == 3
    assert other.model_copy(update={"layout": cfg.layout, "schedule": cfg.schedule}) == cfg


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3}", "has no layout: mapping"),
        ("layout: {}\nschedul: {}", "unknown key schedul; did you mean schedule?"),
        ("layout: [1]", "layout is [1]; needed: a mapping"),
        ("3", "not a mapping of sections"),
    ],
)
def test_layout_files_are_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        load_layout_file(path)
    assert words in str(caught.value)


def test_layout_files(tmp_path: Path) -> None:
    path = tmp_path / "layout.yaml"
    path.write_text("layout: {llm: {tp: 2}}\nschedule: {microbatches: 2}\n")
    assert load_layout_file(path) == ({"llm": {"tp": 2}}, {"microbatches": 2})
    path.write_text("layout:\n")
    assert load_layout_file(path) == ({}, {})
    with pytest.raises(Refused, match="no layout file"):
        load_layout_file(tmp_path / "none.yaml")


@dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    maybe: Inner | None = None


def test_build_makes_plain_dataclasses() -> None:
    assert build(Outer, {"name": "a", "inner": {"width": 5}, "sizes": [1, 2]}, "model.x") == Outer(
        "a", Inner(5), (1, 2)
    )


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({}, "model.x.name is missing"),
        ({"nmae": "a"}, "unknown key model.x.nmae; did you mean name?"),
        ({"name": "a", "inner": {"widht": 5}}, "unknown key model.x.inner.widht; did you mean width?"),
        ({"name": "a", "inner": {"width": True}}, "model.x.inner.width: given True; needed: a number"),
        ({"name": "a", "inner": {"width": "wide"}}, "model.x.inner.width: given 'wide'"),
        ({"name": 3}, "model.x.name: given 3"),
        ({"name": "a", "maybe": {"widht": 5}}, "unknown key model.x.maybe.widht; did you mean width?"),
        ({"name": "a", "maybe": 5}, "model.x.maybe: given 5; needed: a mapping"),
    ],
)
def test_build_is_strict(mapping: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as caught:
        build(Outer, mapping, "model.x")
    assert words in str(caught.value)
