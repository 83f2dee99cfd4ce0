"""Runs whose numbers go wrong: steps and batches that are left out, poisoned weights, going back."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.checkpoint import alone as one_process
from mm.checkpoint.finite import names_not_finite
from mm.checkpoint.saver import save
from mm.config.training import SpikeConfig, TrainConfig
from mm.errors import NonFinite
from mm.order.stream import Stream
from mm.train.guard import Guard
from mm.train.one_step import train_step
from parallel import checkpoint as store
from parallel.sharding import whole
from parallel.sharding.param import declared, local
from tests.mm.harness import Ended, free_port, run_job, run_rank, running, small, weigh
from tests.mm.jobs.test_in_process import metrics, sensor_config
from tests.mm.shards import npy, sensor_samples, write_shard
from tests.mm.train.test_blame import LAYOUTS
from tests.slow import on_demand

SAMPLES, BATCH = 40, 4


def config(folder: Path, broken: int) -> Path:
    """A run whose batch number `broken`, from 1, has an item that is not finite; 0: none has."""
    folder.mkdir(exist_ok=True)
    samples = sensor_samples(SAMPLES, seed=3)
    order, _ = Stream.whole(1, SAMPLES).at(np.arange(SAMPLES))
    mine = [samples[i] for i in order[BATCH * (broken - 1) : BATCH * broken]]
    for name, payload in next(s["parts"] for s in mine if s["parts"]).items() if broken else ():
        next(s for s in mine if s["parts"])["parts"][name] = npy(np.load(io.BytesIO(payload)) * np.inf)
    write_shard(folder / "sensor-000000.tar", samples)
    train = {"steps": 6, "global_batch": BATCH, "warmup": 0.5, "decay": 0}
    return sensor_config(folder, train=train, checkpoint={"every": 1, "keep": 0})


def run(path: Path, *overrides: str) -> Ended:
    return run_job(["train", str(path), *overrides], free_port())


def learnt(folder: Path, after: int = 0) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "tokens", "batch", "drawn_by_source")
    return [tuple(m.get(k) for k in keys) for m in metrics(folder) if m["step"] > after and "loss" in m]


def forget(folder: Path, after: int) -> None:
    for path in store.published(folder / "run"):
        if store.step_of(path) > after:
            shutil.rmtree(path)


def contents(path: Path) -> dict[str, Tensor]:
    tensors = {k: torch.empty(shape, dtype=dtype) for k, (shape, dtype) in store.describe(path).items()}
    store.load(path, tensors)
    return tensors


def test_a_batch_that_breaks_a_run_is_left_out_for_good(tmp_path: Path) -> None:
    path = config(tmp_path, broken=4)
    ended = run(path)
    assert ended.code == 5 and "step 4: an input of module sensor is not finite on rank 0" in ended.err
    assert "data.skip=[4]" in ended.err and len(metrics(tmp_path)) == 3
    late = run(path, "data.skip=[3, 4]")
    assert late.code == 2 and "names batches that the first 3 steps were trained on" in late.err
    assert run(path, "data.skip=[4]").code == 0
    got = learnt(tmp_path)
    assert [m[4] for m in got] == [None, None, None, 5, 6, 7]
    # A run that leaves it out from its start learns the same, and one that goes on without being told again.
    again = config(tmp_path / "again", broken=4)
    assert run(again, "data.skip=['4']").code == 0 and learnt(tmp_path / "again") == got
    forget(tmp_path, after=4)
    assert run(path).code == 0 and learnt(tmp_path) == got


def test_a_step_that_is_not_finite_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = config(tmp_path, broken=4)
    ended = run(path, "train.nonfinite=skip", "train.max_nonfinite=1", "train.average=0.9")
    assert ended.code == 0 and "warning: step 4: an input of module sensor is not finite" in ended.err
    before, after, later = (contents(tmp_path / "run" / f"step-{n:08d}") for n in (3, 4, 5))
    assert before.keys() == after.keys() and any("expert_bias" in k for k in after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(not torch.equal(value, later[name]) for name, value in before.items())
    lines = metrics(tmp_path)
    assert lines[3]["loss"] is None and "micro-batch 0, sample" in lines[3]["left_out"]
    assert all("left_out" not in line for line in lines[4:])
    forget(tmp_path, after=4)
    assert run(path, "train.nonfinite=skip", "train.max_nonfinite=1", "train.average=0.9").code == 0
    assert learnt(tmp_path) == [
        tuple(line.get(k) for k in ("step", "loss", "grad_norm", "tokens", "batch", "drawn_by_source"))
        for line in lines
    ]


def test_a_bound_holds_over_resumes() -> None:
    train = TrainConfig(steps=9000, global_batch=1, nonfinite="skip", max_nonfinite=2)
    guard = Guard(train)
    assert [guard.leaves_out(s) for s in (0, 10)] == [True, True]
    guard = Guard.of(train, guard.skips, json.loads(json.dumps(guard.saved())))
    assert [guard.leaves_out(s) for s in (999, 1000, 1001, 1010)] == [False, True, False, True]
    assert not Guard(TrainConfig(steps=9, global_batch=1)).leaves_out(0)


def test_a_poisoned_checkpoint_is_named_and_an_older_one_is_taken(tmp_path: Path) -> None:
    path = config(tmp_path, broken=0)
    assert run(path, "train.steps=2", "train.warmup=0").code == 0
    expected = learnt(tmp_path)
    for step in (2, 1):
        poisoned = tmp_path / "run" / f"step-{step:08d}"
        tensors, state = contents(poisoned), store.read_state(poisoned)
        name = next(k for k in tensors if k.startswith("llm.layers"))
        tensors[name].view(-1)[-1] = torch.nan
        state.pop("step")
        with one_process.alone():
            store.save(tmp_path / "run", step, tensors, state, keep=0)
        ended = run(path, "train.steps=2", "train.warmup=0")
        if step == 2:
            assert (
                ended.code == 0
                and f"step-00000002 has weights or optimizer state that are not finite: {name}" in ended.err
            )
            assert "resumed from" in ended.out and "at step 1" in ended.out and learnt(tmp_path) == expected
    forget(tmp_path, after=1)
    ended = run(path, "train.steps=2", "train.warmup=0")
    assert ended.code == 4 and "step-00000001 has weights" in ended.err and "resume=none" in ended.err


def save_poisoned(folder: str) -> tuple[str, list[str]]:
    """What saving says where one rank has a weight that is not finite."""
    with running(small(layout={"vision": {"ranks": [0]}})) as (job, feed):
        train_step(job, feed, 0)
        if job.rank.rank == 1:
            part = job.parts["llm"][0]
            whole.free(part)
            next(local(p.detach()) for _, p, _ in declared(part)).view(-1)[0] = torch.inf
        try:
            save(job, feed.index, Path(folder), 1, feed.bad)
            said = "saved"
        except NonFinite as error:
            said = str(error)
        return said, [p.name for p in Path(folder).iterdir()]


def test_weights_that_are_not_finite_are_not_saved(ranks: Any, tmp_path: Path) -> None:
    found = ranks(2, save_poisoned, str(tmp_path))
    assert found[0] == found[1] and found[0][1] == []
    assert "after step 1 weights or optimizer state are not finite: llm." in found[0][0]
    assert "on rank 1. No checkpoint of them was published" in found[0][0]


def test_a_mask_may_be_infinite_and_a_weight_may_not() -> None:
    part = torch.nn.Module()
    for name in ("mask", "mean"):
        part.register_buffer(name, torch.zeros(2))
    job: Any = SimpleNamespace(parts={"m": {0: part}})
    bad = {
        "m.mask": [0, -torch.inf],
        "m.mean": [1, torch.nan],
        "m.w": [torch.inf, 0],
        "m.adam.w.x": torch.nan,
    }
    fine = {"m.u": [3e38, 3e38], "m.empty": [], "m.step": 3}
    assert (
        names_not_finite(job, {k: torch.tensor(v) for k, v in {**bad, **fine}.items()}.items()) == [*bad][1:]
    )


def test_a_jump_is_so_many_high_steps_in_a_row() -> None:
    rule = SpikeConfig(factor=2.0, window=3, steps=2)
    guard = Guard(TrainConfig(steps=9, global_batch=1, spike=rule))
    losses = [9.0, 3.0, 1.0, 6.0, 6.1, 2.0, 4.1, 9.0]
    # The median of 9, 3, 1 is 3; then of 3, 1, 6 it is 3, and of 1, 6, 2 it is 2, after a step that was high.
    assert [bool(guard.jumped(loss)) for loss in losses] == [False] * 7 + [True]


def test_a_run_that_goes_back_is_one_that_left_the_batches_out(tmp_path: Path) -> None:
    path = config(tmp_path, broken=0)
    rate = "train.lr=1e-5"  # losses then go up and down with their batches
    assert run(path, "checkpoint.every=0", rate).code == 0
    losses = [m[1] for m in learnt(tmp_path)]
    ratio = [loss / np.median(losses[k - 2 : k]) for k, loss in enumerate(losses) if k >= 2]
    step = 3 + int(np.argmax(ratio))
    assert max(ratio) > 1.001
    spike = f"train.spike={{factor: {max(ratio) * 0.9999}, window: 2, steps: 1, most: 1}}"
    every = "checkpoint.every=2"
    ended = run(path, every, rate, spike)
    assert ended.code == 0, ended.err
    saved = (step - 1) // 2 * 2
    span = f"{saved + 1}-{step}" if step > saved + 1 else f"{saved + 1}"
    assert f"going on from the checkpoint of step {saved} without the batches {span}" in ended.err
    got = learnt(tmp_path)
    forget(tmp_path, after=saved)
    assert run(path, every, rate, f"data.skip=['{span}']").code == 0 and learnt(tmp_path) == got


def broken_once(raw: dict[str, Any], rank: int, broken: bool) -> list[Any]:
    """Metrics of the third step of three, of which one rank breaks the second, or of which that is not taken;
    then what this rank holds."""
    with running(raw) as (job, feed):
        guard = Guard(job.blueprint.cfg.train)
        train_step(job, feed, 0, guard=guard)
        before = weigh(job)
        if broken:
            handle = None
            if job.rank.rank == rank:
                encoder = job.parts["vision"][0].encoder
                handle = encoder.register_forward_hook(
                    lambda _, args, out: out._replace(values=out.values * np.nan)
                )
            missed = train_step(job, feed, 1, guard=guard)
            assert f"rows of module vision are not finite on rank {rank}" in missed.left_out
            assert guard.left_out == [1]
            llm: Any = job.parts.get("llm", {})  # disjoint ranks of the encoders have none
            assert not any(layer.load.any() for part in llm.values() for layer in part.moe_layers())
            if handle is not None:
                handle.remove()
            after = weigh(job)
            assert all(np.array_equal(after[name][1], value) for name, (_, value) in before.items())
        else:
            feed.next(1, 3)
        last = train_step(job, feed, 2, guard=guard)
        held = {name: value for name, (_, value) in weigh(job).items()}
        return [last.loss, dict(last.grad_norm_by_module), held]


def test_nothing_of_a_step_that_is_left_out_enters_the_next(alone: Any) -> None:
    raw = small()
    raw["train"] |= {"nonfinite": "skip", "global_batch": 4}
    (ours,), (theirs,) = (alone(1, broken_once, raw, 0, broken) for broken in (True, False))
    assert ours[:2] == theirs[:2]
    assert all(np.array_equal(value, theirs[2][name]) for name, value in ours[2].items())


@pytest.mark.parametrize("layout", on_demand(LAYOUTS, ["colocated", "disjoint, pipeline"]))
def test_all_ranks_leave_out_a_step_that_one_has_broken(ranks: Any, layout: str) -> None:
    raw = small(layout=LAYOUTS[layout], schedule={"microbatches": 2})
    raw["train"] |= {"nonfinite": "skip"}
    ours, theirs = (ranks(4, broken_once, raw, 1, broken, timeout=100) for broken in (True, False))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[:2] == other[:2]
        assert mine[2].keys() == other[2].keys()
        assert all(np.array_equal(value, other[2][name]) for name, value in mine[2].items())


@pytest.mark.slow
def test_several_ranks_go_back_together(tmp_path: Path, ranks: Any) -> None:
    path = config(tmp_path, broken=0)
    more = [
        "checkpoint.every=2",
        "train.lr=1e-5",
        "train.spike={factor: 1.0001, window: 2, steps: 1, most: 2}",
    ]
    ended = ranks(2, run_rank, ["train", str(path), *more, "layout.llm.tp=2"], free_port(), timeout=200)
    codes, err = [e.code for e in ended], "".join(e.err for e in ended)
    assert codes in ([0, 0], [5, 5]) and "going on from the checkpoint of step 2 without the batches 3" in err
