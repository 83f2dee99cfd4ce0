"""Checkpoints of a run are listed with the reason why each stays, compared, and removed by its rules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.checkpoint.compared import difference
from mm.checkpoint.kept import rule_of, why_kept
from mm.checkpoint.listed import prune_text
from mm.cli import main
from mm.commands.preflight import check_start
from mm.config.schema import CheckpointConfig, from_mapping
from mm.errors import CheckpointError
from mm.ranks.claim import claimed
from parallel import checkpoint as store
from tests.mm.checkpoint.runs import contents, written
from tests.mm.harness import CONFIGS, free_port, run_job, small
from tests.mm.jobs.test_job import metrics, sensor_config
from tests.mm.shards import sensor_samples, write_shard


def test_what_stays_is_the_last_every_kth_and_the_best() -> None:
    steps, metrics = [1, 2, 3, 4, 5, 6], {2: 0.5, 3: 0.25, 5: 0.25, 6: 9.0}
    assert why_kept(steps, metrics, 1, 4) == {
        1: [],
        2: [],
        3: ["best"],
        4: ["every 4"],
        5: [],
        6: ["last"],
    }
    assert why_kept(steps, {}, 2, 0) == {1: [], 2: [], 3: [], 4: [], 5: ["last"], 6: ["last"]}
    assert all(why_kept(steps, {}, 0, 0).values()), "0 keeps all"


def test_what_a_run_removes_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = store.sound_state

    def removing(path: Path, check: Any) -> Any:
        if path.name == "step-00000002":
            shutil.rmtree(path)
        return read(path, check)

    monkeypatch.setattr(store, "sound_state", removing)
    assert [line[:13] for line in said(capsys, 0, "list", run)] == [f"step-0000000{n}" for n in (1, 3, 4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, the second of the lowest loss; those without a number for one are never the best."""
    rules = {"keep": 1, "keep_every": 3, "keep_best": "loss"}
    config = {"checkpoint": rules, "layout": {"llm": {"tp": 2, "ep": 1, "ranks": "0-3"}}}
    for step, loss in ((1, 2.0), (2, 1.0), (3, "low"), (4, float("nan"))):
        written(tmp_path, step, {"config": config, "metrics": {"loss": loss}})
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], code: int, *argv: Any) -> list[str]:
    assert main(["checkpoint", *map(str, argv)]) == code
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return (out.err if code else out.out).splitlines()


def test_a_run_is_listed_and_pruned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "step-00000005.tmp").mkdir()
    one, two, three, four, left = said(capsys, 0, "list", run, "--sums")
    assert one.startswith(
        "step-00000001: 0.0 MiB; whole; kept as nothing: it goes with the next save; loss 2.0"
    )
    assert "kept as best; loss 1.0000; llm tp 2 on ranks 0-3" in two and "kept as every 3" in three
    assert four.startswith("step-00000004 (latest): ") and "kept as last" in four
    assert left.startswith("step-00000005.tmp: ") and left.endswith("interrupted")
    assert "step-00000001: would go" in said(capsys, 0, "prune", run)[3]
    assert len(store.published(run)) == 4
    said(capsys, 0, "prune", run, "--yes")
    assert [store.step_of(p) for p in store.published(run)] == [2, 3, 4] and not list(run.glob("*.tmp"))
    part = next((run / "step-00000004").glob("*.distcp"))
    part.write_bytes(bytes(part.stat().st_size))
    assert "damaged" in said(capsys, 0, "list", run, "--sums")[2]
    assert "sizes fit" in said(capsys, 0, "list", run)[2]
    said(capsys, 0, "prune", run, "--yes", "--keep-every", 5, "--keep-best", "eval_loss")
    assert [store.step_of(p) for p in store.published(run)] == [3, 4], "the newest that is whole stays"
    with claimed([run]):
        assert "another run" in said(capsys, 2, "prune", run, "--yes")[0]
    assert "is no folder" in said(capsys, 4, "list", run / "nowhere")[0]


@pytest.mark.parametrize(("named", "after"), [(1, 1), (99, 2), (3, 3)])
def test_what_latest_names_stays(named: int, after: int, run: Path) -> None:
    """The newest, 3, is damaged; a run or a script may have been killed before it had `latest` follow."""
    (run / store.LATEST).write_text(f"step-{named:08d}\n")
    (run / "step-00000003" / store.MANIFEST).unlink()
    for later in store.published(run)[3:]:
        store.remove(later)
    prune_text(run, {"keep": 1, "keep_every": 0, "keep_best": None}, remove=True)
    assert {p.name[-1] for p in store.published(run)} == {"2", "3", str(after)}
    assert (run / store.LATEST).read_text() == f"step-{after:08d}\n"


def test_a_save_keeps_what_the_rules_say(run: Path) -> None:
    rules = CheckpointConfig(keep=2, keep_best="loss")
    assert [store.step_of(p) for p in rule_of(rules)(store.published(run))] == [2, 3, 4]


def test_a_start_from_the_folder_of_a_run_is_told_its_newest(run: Path) -> None:
    cfg = from_mapping(small(checkpoint={"weights": str(run)}), CONFIGS)
    with pytest.raises(CheckpointError, match=r"neither a checkpoint .*; its newest is step-00000004$"):
        check_start(cfg)


def test_a_run_keeps_the_best_by_its_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(12))
    config = sensor_config(tmp_path, checkpoint={"every": 1, "keep": 1, "keep_best": "eval_loss"})
    argv = ["train", str(config), "train.steps=4", "train.lr=0.5", "eval.every=1"]  # goes too far in the end
    assert run_job(argv, free_port()).code == 0
    losses = {name: [m[name] for m in metrics(tmp_path) if name in m] for name in ("loss", "eval_loss")}
    best = 1 + min(range(4), key=losses["eval_loss"].__getitem__)
    assert best < 4 and losses["loss"][best - 1] > min(losses["loss"]), "the loss of a step decides otherwise"
    kept = store.published(tmp_path / "run")
    assert [store.step_of(p) for p in kept] == [best, 4]
    assert [store.read_state(p)["metrics"]["eval_loss"] for p in kept] == [
        min(losses["eval_loss"]),
        losses["eval_loss"][3],
    ]
    assert "kept as best; " in said(capsys, 0, "list", tmp_path / "run")[0]


def test_two_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run / "step-00000001"
    config = {"checkpoint": {"keep": 1}, "layout": {"llm": {"tp": 4}}, "train": {}}
    other = contents(one)
    head = other["llm.head"].clone()
    head[1, 2] += 0.5
    changed = {"llm.head": head, "llm.count": torch.tensor(1.0), "llm.more": torch.ones(2)}
    two = written(tmp_path / "other", 1, {"config": config}, **changed)
    assert said(capsys, 0, "diff", one, one)[2:] == [
        "config: equal",
        "llm: 3 of 3 tensors equal to the bit",
        "llm, optimizer: 2 of 2 tensors equal to the bit",
    ]
    lines = said(capsys, 0, "diff", one, two, "--all")
    assert "config: 5 keys differ" in lines and "  layout.llm.tp: 2 | 4" in lines
    relative = 0.5 / float(head.double().abs().max())
    at = next(n for n, line in enumerate(lines) if line.startswith("llm: "))
    assert lines[at].startswith("llm: 1 of 4 tensors equal to the bit; largest difference 0.5, ")
    assert lines[at + 1 : at + 4] == [
        "  llm.count: [] int64 | [] float32",
        f"  llm.more: only in {two}",
        f"  llm.head: at most 0.5 apart, {relative:.3g} relative",
    ]
    assert (
        f"{run}: it is a folder of checkpoints; needed: one of them, as"
        in said(capsys, 4, "diff", run, two)[0]
    )
    assert f"{run}/no: it does not exist" in said(capsys, 4, "inspect", run / "no")[0]
    (two / store.STATE).write_text("{}")
    assert "damaged" in said(capsys, 4, "diff", one, two)[0]


def test_equal_is_to_the_bit() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert difference("x", nan, nan.clone()) is None
    assert difference("x", zero, -zero) is not None, "a zero has a sign"
    assert difference("x", torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)) is None
