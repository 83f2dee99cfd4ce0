"""What is printed and checked before a job runs: header, memory, dry run."""

from __future__ import annotations

from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm.hf import save_hf
from llm.model import LLM
from mm.checkpoint.folders import import_hf
from mm.cli import main
from mm.commands import preflight
from mm.config.outline import llm_config
from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.report import header as header_module
from mm.report.header import header, memory_warning, parameter_counts, ranks_text
from parallel import checkpoint as store
from tests.mm.harness import CONFIGS, small
from tests.mm.shards import write_shard


def blueprint(world: int = 4, **sections: Any) -> Blueprint:
    return draw_up(from_mapping(small(**sections), CONFIGS), world)


def test_the_header_says_what_a_run_is() -> None:
    layout = {"vision": {"ranks": 0}, "audio": {"ranks": "0-1"}, "llm": {"ranks": [3, 2], "pp": 2}}
    run = blueprint(layout=layout, schedule={"microbatches": 6}, train={"dtype": "bfloat16"})
    index = load_index(run.cfg.data.train, run.cfg.base, write=False)
    text = header(run, {"training": index}, "cpu", "gloo")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["run"] == ["runs/run"]
    assert rows["training"][:3] == [
        "data:",
        str(len(index.samples)),
        "samples,",
    ]
    assert rows["steps"] == ["3", "of", "12", "samples", "in", "bfloat16,", "weights", "in", "float32"]
    assert rows["ranks"] == ["4", "on", "cpu,", "messages", "by", "gloo"]
    assert rows["schedule"] == ["1f1b,", "6", "micro-batches", "a", "step"]
    assert rows["vision"][2:] == ["0", "one", "rank"] and rows["audio"][2:] == ["0-1", "dp2"]
    assert rows["llm"][2:] == ["3,2", "pp2"]
    total = sum(int(rows[m][0].replace(",", "")) for m in ("vision", "audio", "llm"))
    assert rows["all"] == [f"{total:,}", "0"]


def test_parameters_are_counted_once_for_any_layout() -> None:
    alone = parameter_counts(blueprint(1))
    # A tied embedding is on the first and on the last stage.
    staged, unstaged = (
        parameter_counts(
            blueprint(
                4, model=small()["model"] | {"llm": small()["model"]["llm"] | {"tied": True}}, layout=layout
            )
        )
        for layout in ({"llm": {"pp": 4}, "vision": {"tp": 2, "pp": 2}}, {})
    )
    assert staged == unstaged and staged["vision"] == alone["vision"]
    assert staged["llm"][0] < alone["llm"][0]


def test_frozen_parameters_are_counted_separately() -> None:
    model = small()["model"]
    model["vision"]["freeze"], model["audio"]["freeze"], model["llm"]["freeze"] = "all", "encoder", True
    trained, open_ = parameter_counts(blueprint(1, model=model)), parameter_counts(blueprint(1))
    assert trained["vision"] == (0, open_["vision"][0]) and trained["llm"] == (0, open_["llm"][0])
    assert 0 < trained["audio"][0] < trained["audio"][1] and sum(trained["audio"]) == open_["audio"][0]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((0, 1, 2, 3), "0-3"), ((2,), "2"), ((0, 2, 4), "0,2,4"), ((3, 2, 0, 1), "3,2,0-1")],
)
def test_ranks_are_named_in_their_own_order(ranks: tuple[int, ...], text: str) -> None:
    assert ranks_text(ranks) == text


def test_memory_that_is_too_small_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    run = blueprint(4, layout={"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": "2-3"}})
    held = header_module.weight_bytes(run)
    assert max(held, key=lambda m: held[m]) == "audio"
    monkeypatch.setattr(header_module, "device_memory", lambda kind: held["audio"])
    assert memory_warning(run, "cuda", 4) is None  # a device is a rank's own
    warning = memory_warning(run, "cpu", 4) or ""  # a host is not
    assert (
        warning.startswith("rank 1 needs")
        and "for 4 ranks" in warning
        and "will not fit on this machine" in warning
    )
    assert memory_warning(run, "cpu", 1) is None
    monkeypatch.setattr(header_module, "device_memory", lambda kind: held["audio"] - 1)
    assert "a cuda device here has" in (memory_warning(run, "cuda", 4) or "")
    monkeypatch.setattr(header_module, "device_memory", lambda kind: None)
    assert memory_warning(run, "cuda", 4) is None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a config, a shard of text without an index, and the language model as published."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    texts = [{"key": f"t{i}", "segments": [{"text": "seven"}], "parts": {}} for i in range(12)]
    write_shard(tmp_path / "text.tar", texts)
    raw = small(data={"train": ["text.tar"], "eval": ["text.tar"]}, run={"dir": "runs/mine"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    torch.manual_seed(0)
    save_hf(LLM(llm_config(from_mapping(raw, tmp_path)), dtype=torch.float64), tmp_path / "published")
    return tmp_path


def tree(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def dry_run(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["train", "c.yaml", "--dry-run", *more])
    return (code, *capsys.readouterr())


def test_a_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    code, out, _ = dry_run(capsys, "--nproc", "2")
    assert code == 0 and "training data: 12 samples" in out and "evaluation data: 12 samples" in out
    assert "messages by gloo" in out and "will not fit" not in out and tree(place) == before
    assert dry_run(capsys, "run.dir=c.yaml/below")[0] == 2 and tree(place) == before
    assert dry_run(capsys, "--draw", "pictures")[0] == 0  # unless it is asked to
    assert {p.name for p in tree(place).keys() - before.keys()} == {
        "pictures",
        "schedule.svg",
        "schedule.png",
    }


def test_a_dry_run_warns_where_the_memory_is_too_small(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_module, "device_memory", lambda kind: 2**20)
    code, out, _ = dry_run(capsys)
    assert code == 0 and "warning: rank 0 needs" in out and "will not fit on this machine" in out


def test_a_dry_run_refuses_weights_that_do_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_hf(place / "published", place / "taken")
    for weights in ("published", "taken/step-00000000"):
        given = f"checkpoint.weights={weights}"
        assert dry_run(capsys, given)[0] == 0
        code, _, err = dry_run(capsys, given, "model.llm.d_model=16")
        assert code == 4 and f"cannot start from {weights}" in err and len(err.splitlines()) == 1
    assert "llm.head has shape (264, 24), this model needs (264, 16)" in err
    code, _, err = dry_run(capsys, given, "checkpoint.resume=taken")  # it has no encoders to resume
    assert code == 4 and "tensors of this model, first audio." in err


def test_a_checkpoint_of_other_modules_is_no_start(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_hf(place / "published", place / "taken")
    theirs = {f"other.{key}": entry for key, entry in store.describe(place / "taken/step-00000000").items()}
    monkeypatch.setattr(store, "describe", lambda path: theirs)
    code, _, err = dry_run(capsys, "checkpoint.weights=taken/step-00000000")
    assert code == 4 and "it has weights of other, the model's modules are audio, vision, llm" in err


@pytest.mark.parametrize("package, value", [("tensorboard", True), ("wandb", "mine")])
def test_a_board_that_is_not_installed_is_refused(
    package: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = from_mapping(small(run={package: value}), CONFIGS)
    (tmp_path / package).mkdir()
    folder = PathFinder.find_spec(package, [str(tmp_path)])  # which is no package, and which W&B makes
    assert folder is not None and folder.origin is None
    for found in (None, folder):
        monkeypatch.setattr(preflight, "find_spec", lambda name, found=found: found)
        with pytest.raises(Refused, match=rf"pip install -e '.\[{package}\]'"):
            preflight.check_paths(cfg, write=False)
    monkeypatch.setattr(preflight, "find_spec", lambda name: ModuleSpec(name, None, origin="there"))
    preflight.check_paths(cfg, write=False)
