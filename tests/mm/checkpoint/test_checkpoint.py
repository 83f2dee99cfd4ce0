"""A run resumes: bit-identically under its layout, exactly under another, and never from damage."""

from __future__ import annotations

import gc
import pickle
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm.checkpoint import resume
from mm.checkpoint import state as checkpoint
from mm.checkpoint.folders import export_hf
from mm.checkpoint.verified import verify_text
from mm.config.schema import from_mapping
from mm.errors import CheckpointError
from mm.plan.blueprint import draw_up
from mm.ranks.job import open_index
from mm.ranks.launch import RankInfo
from mm.train.one_step import train_step
from mm.train.trainer import train_on
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from tests.mm.checkpoint.runs import contents, part_of_run
from tests.mm.harness import CONFIGS, largest_difference, small
from tests.mm.shards import sensor_samples, write_shard
from tests.slow import on_demand

TRAIN = {"steps": 4, "global_batch": 5}


def run(raw: dict[str, Any], folder: str, first: int, last: int) -> list[dict[str, Any]]:
    """Steps [first, last) of a part of a run."""
    with part_of_run(raw, folder, first, last) as (job, feed):
        return [asdict(train_step(job, feed, step)) for step in range(first, last)]


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
    with pytest.raises(
        CheckpointError, match=r"written by a run with another .*: run\.seed was 1, now 2; needed"
    ):
        check({**raw, "run": {"seed": 2}})
    raw["model"]["vision"]["projector"]["hidden"] = 12
    with pytest.raises(
        CheckpointError, match=r"vision\.projector.* has shape .*, this model needs"
    ) as caught:
        check(raw)
    assert "of its config model.vision.projector.hidden was 24, now 12" in str(caught.value)


WORLDS: list[tuple[int, dict[str, Any]]] = [(1, {}), (3, {}), (4, {"audio": {"tp": 4}, "llm": {"ep": 2}})]


@pytest.mark.parametrize(("world", "layout"), on_demand(WORLDS, WORLDS[:2], several=True))
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
    assert resume.find(cfg, folder) == older
    assert f"{part.name} has" in capsys.readouterr().err
    (older / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"state.json is missing; to begin anew: checkpoint.resume=none"
    ):
        resume.find(cfg, folder)
    assert resume.find(from_mapping(small(checkpoint={"resume": "none"}), CONFIGS), folder) is None
    with pytest.raises(CheckpointError, match=part.name):
        resume.find(from_mapping(small(train=TRAIN, checkpoint={"resume": str(newest)}), CONFIGS), folder)


def test_checkpoints_without_manifests_are_not_taken_for_absent(saved: Any, tmp_path: Path) -> None:
    folder = Path(copy(saved[0], tmp_path))
    newest = store.published(folder)[-1]
    (newest / store.MANIFEST).unlink()
    for wanted in ("auto", str(folder), str(newest)):
        cfg = from_mapping(small(train=TRAIN, checkpoint={"resume": wanted}), CONFIGS)
        with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: manifest.json is missing"):
            resume.find(cfg, folder)


ALONE = RankInfo(0, 1, torch.device("cpu"), launch="here")


def auto(folder: Path, rank: RankInfo, wanted: str = "auto") -> Path | None:
    cfg = from_mapping(small(train=TRAIN, checkpoint={"resume": wanted}), CONFIGS)
    return resume.find(cfg, folder, rank)


def test_a_run_that_begins_anew_sets_the_old_checkpoints_aside_first(saved: Any, tmp_path: Path) -> None:
    folder = Path(copy(saved[0], tmp_path))
    resume.begin(folder, ALONE, None, 0)  # and is killed before its first own checkpoint
    assert auto(folder, ALONE) is None
    assert not store.verify(folder / "replaced-step-00000002")
    copy(saved[0], tmp_path)
    resume.begin(folder, ALONE, None, 0)
    assert not store.verify(folder / "replaced-step-00000002.2")
    assert not store.verify(folder / "replaced-step-00000002")


def test_a_run_that_goes_on_keeps_what_it_follows(saved: Any, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", Path(copy(saved[0], tmp_path / "other"))
    for step in (1, 2, 10):
        copy(saved[0] / "step-00000002", folder / f"step-{step:08d}")
    resume.begin(folder, ALONE, folder / "step-00000002", 2)
    assert [p.name for p in store.published(folder)] == ["step-00000001", "step-00000002"]
    resume.begin(folder, ALONE, other / "step-00000002", 2)
    assert store.published(folder) == [] and len(store.published(other)) == 1


@pytest.mark.parametrize("wanted", ["none", "elsewhere"])
def test_a_launch_that_is_started_again_goes_on_from_its_own(
    wanted: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "run", copy(saved[0], tmp_path / "elsewhere")
    wanted = wanted if wanted == "none" else other
    began = None if wanted == "none" else Path(other) / "step-00000002"
    again = replace(ALONE, relaunched=True)
    assert auto(folder, ALONE, wanted) == began
    assert auto(folder, again, wanted) == began  # it failed before it began
    resume.begin(folder, ALONE, began, 0)
    assert auto(folder, again, wanted) == began  # and before its first checkpoint
    own = Path(copy(saved[0] / "step-00000002", folder / "step-00000003"))
    assert auto(folder, again, wanted) == own
    assert auto(folder, replace(again, launch="another"), wanted) == began
    assert auto(folder, ALONE, wanted) == began  # the same command, given again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert auto(folder, ALONE, wanted) == began
    resume.begin(folder, ALONE, own, 3)
    assert auto(folder, replace(ALONE, launch="a new store"), wanted) == own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job8")
    assert auto(folder, replace(ALONE, launch="a new store"), wanted) == began


def agree(folder: str, store_file: str) -> tuple[str, list[str], float]:
    """What this rank finds, which files it has summed up, and how long it waited for the last rank."""
    shared = dist.FileStore(store_file, dist.get_world_size())
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), shared, timeout_s=0.5)
    entry_of, summed = manifest.entry_of, list[str]()

    def slowly(file: Path, heartbeat: Any) -> manifest.Entry:
        summed.append(f"{file.parent.name}/{file.name}")
        for _ in range(12 if rank.rank == 1 else 0):  # longer than any wait may be, but alive
            time.sleep(0.1)
            heartbeat()
        return entry_of(file, heartbeat)

    manifest.entry_of, resume.HEARTBEAT_S, start = slowly, 0.1, time.monotonic()
    try:
        found = auto(Path(folder), rank)
    finally:
        manifest.entry_of, resume.HEARTBEAT_S = entry_of, 1.0
    return str(found), summed, time.monotonic() - start


def test_ranks_share_the_verifying_and_wait_as_long_as_one_is_alive(
    saved: Any, ranks: Any, tmp_path: Path
) -> None:
    folder = Path(copy(saved[0], tmp_path / "run"))
    newest = Path(copy(folder / "step-00000002", folder / "step-00000003"))
    part = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    part.write_bytes(bytes(part.stat().st_size))
    found = ranks(2, agree, str(folder), str(tmp_path / "store"))
    assert [f[0] for f in found] == [str(folder / "step-00000002")] * 2
    summed = [name for f in found for name in f[1]]
    assert sorted(summed) == sorted(
        f"{p.name}/{name}" for p in store.published(folder) for name in manifest.names(p)
    )
    assert found[0][2] > 1.0


def stop_at(read: int) -> Any:
    """A request that is noticed when it is looked for the `read`-th time, on the last rank alone."""

    class Late:
        count = 0

        @property
        def requested(self) -> bool:
            self.count += 1
            return dist.get_rank() == dist.get_world_size() - 1 and self.count >= read

    return Late()


def train_until(raw: dict[str, Any], read: int) -> list[str]:
    """The names of the checkpoints and the last line of the log of a run that is asked to end."""
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    train_on(blueprint, rank, stop_at(read))
    folder = Path(blueprint.cfg.run.dir)
    log = (folder / "log.txt").read_text().splitlines()
    waits = [x for x in log if x.startswith("to end after step ")]
    assert len(waits) == (blueprint.cfg.checkpoint.remote.url is not None), log
    assert all("at most 7 s (checkpoint.remote.wait_s); another signal" in x for x in waits)
    return [*(p.name for p in store.published(folder)), next((x for x in log if "stopped" in x), "done")]


COPIED = 3  # of the runs below, the one that copies its checkpoints


def train_several(raw: dict[str, Any], folder: str, reads: list[int]) -> tuple[list[list[str]], int]:
    """What each run leaves, and how many threads of groups all of them have left in this process."""
    dist.barrier()
    before, out = group_threads(), []
    for read in reads:
        raw["run"]["dir"] = f"{folder}/{read}"
        target = {"url": f"file://{folder}/copies", "wait_s": 7} if read == COPIED else {}
        raw["checkpoint"]["remote"] = target
        out.append(train_until(raw, read))
        dist.barrier()
    gc.collect()
    return out, group_threads() - before


def group_threads() -> int:
    """Threads of gloo groups in this process, by their name; 0 where the system does not list them."""
    tasks = Path("/proc/self/task")
    names = [(t / "comm").read_text() for t in tasks.iterdir()] if tasks.exists() else []
    return sum(name.startswith("pt_gloo") for name in names)


def test_a_request_to_one_rank_ends_the_run_well_whenever_it_comes(ranks: Any, tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "sensor.tar", sensor_samples(12)))
    raw = small(
        train={"steps": 3, "global_batch": 4},
        data={"train": [shard], "eval": [shard]},
        eval={"every": 1, "samples": 4},
        checkpoint={"every": 2},
    )
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}}
    raw["model"] = {"sensor": sensor, "llm": {**raw["model"]["llm"], "pattern": "M*"}}
    # It is looked for before the first step, with each step, after a save, and in evaluations.
    raw["layout"] = {"llm": {"tp": 2}}
    got, left = ranks(2, train_several, raw, str(tmp_path), [1, 2, 3, 5, 6, 100], timeout=120)[0]
    # A group that is not gone when the interpreter ends may end the process with SIGABRT. Torch before 2.13
    # keeps the mesh of every DTensor operation for good, and the groups with it.
    assert left <= 0 or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    first, second = "step-00000001", "step-00000002"
    assert got == [
        ["stopped by a signal after step 0"],
        [first, "stopped by a signal after step 1"],
        [first, "stopped by a signal after step 1"],  # in the evaluation
        [second, "stopped by a signal after step 2"],
        [second, "stopped by a signal after step 2"],
        [second, "step-00000003", "done"],
    ]


def refusal(raw: dict[str, Any], folder: str, first: int, last: int) -> str:
    """The error where these steps cannot be run and saved."""
    try:
        run(raw, folder, first, last)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_own(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "step-00000001.tmp").write_text("a file where its folder would be")
    message = ranks(1, refusal, small(train=TRAIN), str(tmp_path), 0, 1)[0]
    assert message.startswith(f"no checkpoint can be written to {tmp_path}: ")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_metadata_is_not_unpickled_freely(saved: Any, tmp_path: Path, capsys: Any) -> None:
    newest = store.published(Path(copy(saved[0], tmp_path)))[-1]
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        checkpoint.inspect_text(newest)
    manifest.write(newest, {n: manifest.entry_of(newest / n) for n in manifest.names(newest)})
    for read in (
        checkpoint.inspect_text,
        verify_text,
        lambda p: export_hf(p, tmp_path / "hf", None),
    ):
        with pytest.raises(CheckpointError, match=r"refusing to load builtins.print"):
            read(newest)
    assert "unpickled" not in capsys.readouterr().out


def test_another_model_is_refused_by_name(saved: Any, ranks: Any, tmp_path: Path) -> None:
    raw = small(train=TRAIN)
    raw["model"]["llm"]["mlp_ffn"] = 96
    message = ranks(1, refusal, raw, copy(saved[0], tmp_path), 2, 4)[0]
    assert "layers.3.mixer" in message and "shape" in message


def test_text_for_people(saved: Any) -> None:
    newest = store.published(saved[0])[-1]
    assert "llm.head" in checkpoint.inspect_text(newest) and "whole" in verify_text(newest)
