"""A model asked over the ranks of a job says what it says in one process, in any layout."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from llm.decode import next_logits
from mm.cli import main
from mm.ranks.control import Control
from tests.mm.harness import CONFIGS, Ended, free_port, run_job, run_rank, small
from tests.slow import on_demand

DIGITS = str(CONFIGS / "data" / "digits-train-*.tar")
TWO = "schedule.microbatches=2"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp with experts": (2, ("layout.llm.tp=2", "layout.vision.tp=2", "layout.llm.sequence_parallel=true")),
    "dp and ep": (2, ("layout.llm.ep=2",)),
    "stages of both": (2, ("layout.llm.pp=2", "layout.vision.pp=2")),
    "cp": (2, ("layout.llm.cp=2", "layout.vision.cp=2")),
    "virtual stages, etp": (
        4,
        ("layout.llm.pp=2", "layout.llm.vpp=2", "layout.llm.tp=2", "layout.llm.etp=2", TWO),
    ),
    "apart": (
        4,
        ("layout.llm.ranks=1-3", "layout.llm.pp=3", "layout.vision.ranks=0-0", "layout.audio.ranks=0-0"),
    ),
    "mixed": (
        4,
        ("layout.llm.ranks=[3,1]", "layout.llm.tp=2", "layout.llm.ep=2", "layout.vision.ranks=[2,0]",
         "layout.vision.tp=2", "layout.audio.ranks=[0,2]", "layout.audio.pp=2"),
    ),
}  # fmt: skip
OFTEN = ("tp with experts",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, a prompt's picture beside it."""
    base = tmp_path_factory.mktemp("run")
    raw = small(
        run={"dir": str(base / "run"), "timeout_s": 30.0},
        data={"train": [DIGITS]},
        train={"steps": 2},
        checkpoint={"every": 2},
    )
    raw["model"]["llm"] |= {"pattern": "ME-*", "level_layers": [2]}  # attention sees the level
    raw["model"]["vision"]["options"]["levels"] = [0]
    (base / "c.yaml").write_text(yaml.safe_dump(raw))
    ended = run_job(["train", str(base / "c.yaml")], free_port())
    assert ended.code == 0, ended.err
    return base / "run"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A picture and a sound of the prompt."""
    from tests.encoders.helpers import png, wav

    base = tmp_path_factory.mktemp("items")
    (base / "a.png").write_bytes(png(8, 12))
    (base / "b.wav").write_bytes(wav(3000))
    return ["--image", str(base / "a.png"), "--audio", str(base / "b.wav")]


def asks(run: Path, out: Path, files: list[str], *more: str) -> list[str]:
    return ["generate", str(run), "--text", "sees ", *files, "--tokens", "12", "--json", str(out), *more]


DRAWN = ("--temperature", "1.5", "--top-p", "0.95", "--seed", "5", "--tokens", "30")


@pytest.mark.parametrize("name", on_demand(LAYOUTS, [n for n in LAYOUTS if n not in OFTEN]))
def test_the_answer_is_that_of_one_process(
    name: str, run: Path, files: list[str], tmp_path: Path, ranks: Any
) -> None:
    world, overrides = LAYOUTS[name]
    for how in ((), DRAWN):
        assert main(asks(run, tmp_path / "one", files, *how)) == 0
        ended = ranks(world, run_rank, asks(run, tmp_path / "all", files, *how, *overrides), free_port())
        assert [e.code for e in ended] == [0] * world, "".join(e.err for e in ended)
        one, several = (json.loads((tmp_path / x).read_text()) for x in ("one", "all"))
        assert several == one and len(one["ids"]) > 2
        assert ended[0].out.endswith(one["text"] + "\n") and not any(e.out for e in ended[1:])


def heard(argv: list[str], port: int | None = None) -> list[Tensor]:
    """The logits of each token of an answer, where the last stage is; port: of a rank of the pool."""
    found: list[Tensor] = []

    def record(*args: Any) -> Tensor:
        found.append(next_logits(*args))
        return found[-1]

    where = "llm.decode" if port is None else "mm.inference.spread"
    with mock.patch(f"{where}.next_logits", record):
        ended = run_rank(argv, port) if port is not None else run_job(argv, free_port())
    assert ended.code == 0, ended.err
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["ME|-*", "M|E|-|*"])  # the level enters after the third layer
def test_each_stage_adds_the_levels_that_enter_there(
    stages: str, run: Path, files: list[str], tmp_path: Path, ranks: Any
) -> None:
    """By logits: a greedy answer of so small a model may be the same without them."""
    alone = heard(asks(run, tmp_path / "one", files))
    split = (
        f"model.llm.pattern={stages}",
        "layout.llm.pp=2",
        f"layout.llm.vpp={(stages.count('|') + 1) // 2}",
    )
    more = (*split, "layout.vision.ranks=[1]", "layout.audio.ranks=[0]", TWO)
    spread = ranks(2, heard, asks(run, tmp_path / "all", files, *more), free_port())
    assert not spread[0] and len(spread[1]) == len(alone) > 2
    for ours, theirs in zip(spread[1], alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def silent(argv: list[str], port: int, rank: int) -> Ended:
    """An answer in which one rank falls silent at its third token."""
    told, me = Control.gather, dist.get_rank()

    def gather(control: Control, values: Any) -> Any:
        steps.append(1)
        if me == rank and len(steps) == 5:
            time.sleep(8.0)
            raise RuntimeError("too late")
        return told(control, values)

    steps: list[int] = []
    with mock.patch.object(Control, "gather", gather):
        return run_rank(argv, port)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["layout.llm.ep=1", "layout.llm.tp=2", "layout.llm.pp=2"])
def test_a_rank_that_falls_silent_is_named(
    layout: str, run: Path, files: list[str], tmp_path: Path, ranks: Any
) -> None:
    argv = asks(run, tmp_path / "x", files, layout, "run.timeout_s=2")
    ended = ranks(2, silent, argv, free_port(), 1)
    assert ended[0].code == 1 and "no word from rank 1, which has ended or hangs" in ended[0].err
    assert "Traceback" not in ended[0].err and not (tmp_path / "x").exists()


def test_what_cannot_be_spread_is_refused_in_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path, more, why in (
        (tmp_path, ["--nproc", "2"], "is a published folder, which has no layout; needed: one process"),
        (run, ["layout.llm.tp=2"], "layouts are of several ranks: needed with --nproc N, or torchrun"),
        (run, ["--nproc", "2", "layout.llm.tp=3"], "tp"),
        (run, ["--nproc", "2", "layout.llm.tq=2"], "unknown key layout.llm.tq"),
    ):
        assert main(["generate", str(path), *more]) == 2
        assert why in capsys.readouterr().err
