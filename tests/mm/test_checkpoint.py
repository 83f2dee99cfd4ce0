"""A run resumes: bit-identically under its layout, exactly under another, and never from damage."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm import checkpoint
from mm.blueprint import draw_up
from mm.config import from_mapping
from mm.errors import CheckpointError
from mm.feed import Feed
from mm.job import build_job, open_data, open_index
from mm.launch import RankInfo
from mm.trainer import train_step
from parallel import checkpoint as store
from tests.mm.harness import CONFIGS, largest_difference, small

TRAIN = {"steps": 4, "global_batch": 5}


def run(raw: dict[str, Any], folder: str, first: int, last: int) -> list[dict[str, Any]]:
    """Steps [first, last): from a checkpoint unless first is 0, ending in one."""
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    index = open_index(blueprint, blueprint.cfg.data.train, CONFIGS)
    job = build_job(blueprint, rank)
    data = open_data(job, index)
    if first:
        found = checkpoint.find(blueprint.cfg, Path(folder))
        assert found is not None and checkpoint.load(job, data.index, found)["step"] == first
    feed = Feed(data.index, data.assembler, job.control, seed=1, global_batch=5, ahead=1)
    try:
        out = [train_step(job, feed, step) for step in range(first, last)]
        checkpoint.save(job, data.index, Path(folder), last, feed.bad)
    finally:
        feed.close()
        job.close()
    return out


@pytest.fixture(scope="module")
def saved(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint after 2 steps of 4, tp2 x dp2 with experts over 4 ranks, ranks in orders of their own, and
    the steps that follow."""
    whole, half = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("half")
    raw = small(train=TRAIN, layout=LAYOUT)
    rest = pool.run(4, run, raw, str(whole), 0, 4)[0][2:]
    pool.run(4, run, raw, str(half), 0, 2)
    return half, rest


LAYOUT = {
    "vision": {"ranks": [2, 1, 3, 0], "tp": 2},
    "audio": {"ranks": [2, 0]},
    "llm": {"ranks": [3, 1, 2, 0], "tp": 2, "ep": 4, "sequence_parallel": True},
}


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    tensors = {k: torch.empty(shape, dtype=dtype) for k, (shape, dtype) in store.describe(path).items()}
    store.load(path, tensors)
    return tensors


def test_a_checkpoint_holds_what_one_process_writes(saved: Any, ranks: Any, tmp_path: Path) -> None:
    """From the first weights on: whichever rank a shard is on, it has its place in the whole."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    for last in (0, 2):
        ranks(1, run, small(train=TRAIN), str(alone), 0, last)
    ranks(4, run, small(train=TRAIN, layout=LAYOUT), str(spread), 0, 0)
    for step, folder, tolerance in ((0, spread, 0.0), (2, saved[0], 1e-9)):
        ours, theirs = (contents(f / f"step-{step:08d}") for f in (folder, alone))
        assert ours.keys() == theirs.keys() and len(ours) > 100
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


def copy(path: Path, to: Path) -> str:
    import shutil

    shutil.copytree(path, to, dirs_exist_ok=True)
    return str(to)


def losses(steps: list[dict[str, Any]]) -> list[Any]:
    return [(s["loss"], s["grad_norm"]) for s in steps]


def test_the_same_layout_resumes_bit_identically(saved: Any, ranks: Any, tmp_path: Path) -> None:
    folder, rest = saved
    got = ranks(4, run, small(train=TRAIN, layout=LAYOUT), copy(folder, tmp_path), 2, 4)[0]
    assert losses(got) == losses(rest)


def test_what_does_not_fit_is_known_without_reading_tensors(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
    path = Path(copy(folder, tmp_path)) / "step-00000002"
    for data in path.glob("*.distcp"):
        data.unlink()
    raw = small(train=TRAIN, layout={"llm": {"pp": 2}})

    def check(raw: dict[str, Any]) -> None:
        blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
        index = open_index(blueprint, blueprint.cfg.data.train, CONFIGS)
        checkpoint.check_resume(blueprint, index, path)

    check(raw)
    with pytest.raises(CheckpointError, match="written by a run with another"):
        check({**raw, "run": {"seed": 2}})
    raw["model"]["vision"]["projector"]["hidden"] = 12
    with pytest.raises(CheckpointError, match=r"vision\.projector.* has shape .*, this model needs"):
        check(raw)


@pytest.mark.parametrize("world, layout", [(1, {}), (3, {}), (4, {"audio": {"tp": 4}, "llm": {"ep": 2}})])
def test_another_layout_resumes_exactly(
    saved: Any, ranks: Any, tmp_path: Path, world: int, layout: Any
) -> None:
    folder, rest = saved
    got = ranks(world, run, small(train=TRAIN, layout=layout), copy(folder, tmp_path), 2, 4)[0]
    assert largest_difference(got, rest) < 1e-9


def test_damage_is_found_and_auto_resume_takes_an_older_one(saved: Any, tmp_path: Path, capsys: Any) -> None:
    folder = Path(copy(saved[0], tmp_path))
    newest = store.published(folder)[-1]
    older = Path(copy(newest, folder / "step-00000001"))
    part = next(newest.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-7])
    assert part.name in store.verify(newest)[0]
    cfg = from_mapping(small(train=TRAIN), CONFIGS)
    assert checkpoint.find(cfg, folder) == older
    assert f"{part.name} has" in capsys.readouterr().err
    (older / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"state.json is missing; to begin anew: checkpoint.resume=none"
    ):
        checkpoint.find(cfg, folder)
    assert checkpoint.find(from_mapping(small(checkpoint={"resume": "none"}), CONFIGS), folder) is None
    with pytest.raises(CheckpointError, match=part.name):
        checkpoint.find(from_mapping(small(train=TRAIN, checkpoint={"resume": str(newest)}), CONFIGS), folder)


def test_a_run_that_begins_again_keeps_its_own_checkpoints(saved: Any, ranks: Any, tmp_path: Path) -> None:
    folder = Path(copy(saved[0], tmp_path))
    (folder / "step-00000002").rename(folder / "step-00000009")
    ranks(1, run, small(train=TRAIN, checkpoint={"keep": 1}), str(folder), 0, 1)
    assert [p.name for p in store.published(folder)] == ["step-00000001"]
    assert not store.verify(folder / "replaced-step-00000009")


def refusal(raw: dict[str, Any], folder: str, first: int, last: int) -> str:
    """What is said where these steps cannot be run and saved."""
    try:
        run(raw, folder, first, last)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_that_cannot_be_written_is_told_in_words(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "step-00000001.tmp").write_text("a file where its folder would be")
    message = ranks(1, refusal, small(train=TRAIN), str(tmp_path), 0, 1)[0]
    assert "the checkpoint of step 1 cannot be written" in message and "MiB free" in message


class Evil:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_metadata_is_not_unpickled_freely(saved: Any, tmp_path: Path, capsys: Any) -> None:
    newest = store.published(Path(copy(saved[0], tmp_path)))[-1]
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(store.BadCheckpoint, match=r"refusing to load builtins.print"):
        store.describe(newest)
    assert "unpickled" not in capsys.readouterr().out


def test_another_model_is_refused_by_name(saved: Any, ranks: Any, tmp_path: Path) -> None:
    raw = small(train=TRAIN)
    raw["model"]["llm"]["mlp_ffn"] = 96
    message = ranks(1, refusal, raw, copy(saved[0], tmp_path), 2, 4)[0]
    assert "layers.3.mixer" in message and "shape" in message


def test_text_for_people(saved: Any) -> None:
    newest = store.published(saved[0])[-1]
    assert "llm.head" in checkpoint.inspect_text(newest) and "whole" in checkpoint.verify_text(newest)
