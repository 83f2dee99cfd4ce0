"""Numbers of a run on boards: the same names on each, and a run that resumes goes on."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.train.boards import TensorBoard, open_boards
from mm.train.console import Console
from tests.mm.harness import CONFIGS, small
from tests.mm.train.test_console import RESULT, record

Written = dict[tuple[str, float], float]


def written_by(tmp_path: Path, first: int = 4, **run: Any) -> None:
    console = Console(tmp_path, 9, first=first, lead=True)
    console.boards += open_boards(from_mapping(small(run=run), CONFIGS), tmp_path, first)
    console.step(record(first + 1))
    console.evaluation(first + 1, RESULT)
    console.close()


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Written:
    written: Written = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")
            written["purged", 0] = purge_step

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name, step] = value

        def close(self) -> None:
            written["closed", 0] = 1.0

    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    return written


class FakeWandb(types.ModuleType):
    """What a run uses of wandb. begun: what each init was given."""

    Error = RuntimeError

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.written: Written = {}
        self.begun: list[dict[str, Any]] = []
        self.id, self.fails = "abc", fails
        self.metrics: list[tuple[str, str | None]] = []

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> FakeWandb:
        if self.fails:
            raise RuntimeError(self.fails)
        self.begun.append(given)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.written.update({(name, values["step"]): v for name, v in values.items() if name != "step"})

    def finish(self) -> None:
        self.written["closed", 0] = 1.0


def test_no_board_is_opened_unasked(tmp_path: Path, tensorboard: Written) -> None:
    written_by(tmp_path)
    assert not tensorboard


def test_boards_get_the_same_numbers_by_the_same_names(
    tmp_path: Path, tensorboard: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    written_by(tmp_path, tensorboard=True, wandb="mine")
    assert tensorboard.pop(("purged", 0)) == 5  # what an earlier start wrote of step 5 is made again
    assert tensorboard == wandb.written
    assert tensorboard["loss", 5] == 1 / 3 and tensorboard["lift/vision", 5] == 1.2345
    assert tensorboard["grad_norm/llm", 5] == 1.5 and tensorboard["closed", 0]
    assert wandb.metrics == [("step", None), ("*", "step")]


def test_steps_that_are_taken_again_hide_the_first_ones(
    tmp_path: Path, tensorboard: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss that jumped; the file that is open is closed, and a new one says from where on."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    console = Console(tmp_path, 9, first=4, lead=True)
    run = small(run={"tensorboard": True, "wandb": "mine"})
    console.boards += open_boards(from_mapping(run, CONFIGS), tmp_path, 4)
    console.went_back(2, 4, "the loss is high", ["3-4"])
    assert tensorboard == {("purged", 0): 3, ("closed", 0): 1.0}
    assert wandb.written == {("went_back", 2): 1.0}
    console.close()


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """As its own reader has it. Needs the extra tensorboard."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, 0)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        board.plot(step, {"loss": loss})
    board.went_back(1)
    board.plot(2, {"loss": 20.0})
    board.close()
    board = TensorBoard(tmp_path, 1)  # resumes from an older checkpoint
    board.plot(2, {"loss": 200.0})
    board.close()
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 200.0)]


def test_a_run_that_resumes_goes_on_in_its_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    url = "s3://key:secret@store/a.tar"
    run = from_mapping(small(run={"wandb": "mine"}, data={"train": [url]}), CONFIGS)
    for first in (0, 4, 0):
        for board in open_boards(run, tmp_path, first):
            board.close()
    assert [(b["project"], b["id"], b["resume"]) for b in wandb.begun] == [
        ("mine", None, None),
        ("mine", "abc", "allow"),
        ("mine", None, None),
    ]
    assert wandb.begun[0]["config"]["run"]["wandb"] == "mine" and "secret" not in str(wandb.begun)


def test_where_wandb_cannot_begin_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="no key"))
    with pytest.raises(Refused, match="no key; needed: `wandb login`, or WANDB_MODE=offline"):
        written_by(tmp_path, wandb="mine")


@pytest.mark.slow
def test_the_real_wandb_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: None
) -> None:
    """Without the network. Needs the extra wandb."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 4):
        written_by(tmp_path, first, wandb="mine")
    found = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(found) == 2 and len({p.stem for p in found}) == 1  # one run of theirs
    for path, step in zip(found, (1, 5), strict=True):
        whole = path.read_bytes()  # records of protobuf, with values as JSON
        for name, value in (("loss", 1 / 3), ("grad_norm/llm", 1.5), ("lift/vision", 1.2345)):
            assert name.encode() in whole and repr(value).encode() in whole
        assert re.search(rb"step.{1,6}%d" % step, whole)
