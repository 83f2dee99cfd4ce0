"""Modules that others wrote, taken into a job as they are: values, buffers, dtypes, layouts, resume."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import encoders
from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import bare_module, draw_up
from mm.ranks.job import build_job
from mm.ranks.launch import RankInfo
from mm.train import evaluate
from parallel import checkpoint as store
from parallel.sharding.param import declared, global_index, initialise, local, seeded
from parallel.sharding.shard import held_indices
from parallel.topology.axis import Axes
from parallel.topology.stage import whole
from tests.encoders.helpers import png
from tests.mm.checkpoint import test_checkpoint
from tests.mm.harness import CONFIGS, largest_difference, small, train_few
from tests.mm.jobs.test_speech import clips
from tests.mm.shards import sensor_samples, write_shard

LLM = {"pattern": "*-", "n_experts": 4, "top_k": 1}
SIGLIP = "examples.siglip_encoder:SiglipEncoder"


def raw_with(encoder: str, folder: Path, name: str = "sensor", **sections: Any) -> dict[str, Any]:
    raw = small(data={"train": [str(folder / "*.tar")]}, **sections)
    made = {"encoder": encoder, "projector": {"hidden": 24}}
    raw["model"] = {name: made, "llm": raw["model"]["llm"] | LLM}
    return raw


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard(tmp_path_factory.mktemp("series") / "a.tar", sensor_samples(20)).parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, samples = random.Random(1), []
    for k in range(12):
        parts = {f"img{i}.png": png(8, 8 + 4 * i, seed=k, mode="RGB") for i in range(rng.choice([0, 1, 2]))}
        segments = [*({"vision": name} for name in parts), {"text": str(k), "depends": "vision"}]
        samples.append({"key": f"s{k}", "segments": segments, "parts": parts})
    return write_shard(tmp_path_factory.mktemp("pictures") / "a.tar", samples).parent


def siglip(raw: dict[str, Any]) -> tuple[float, float, list[dict[str, Any]]]:
    """How far the features of a job's SigLIP are from those of the model that was wrapped, the largest of its
    features, and a few steps of training."""
    cls = encoders.resolve(SIGLIP)  # which makes transformers importable
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    job = build_job(blueprint, RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    cfg = cls.Config()
    items = [cls.prepare(cfg, png(9, 9 + i, seed=i, mode="RGB"), {}) for i in range(2)]
    batch = encoders.pack_items(cls, cfg, items, [{}, {}], device="cpu", dtype=torch.float64)
    found = []
    part = job.parts["vision"][0]
    part.encoder.register_forward_hook(lambda module, args, output: found.append(output.values.detach()))
    part(batch)
    job.close()
    with seeded("vision", blueprint.cfg.run.seed):
        alone = sys.modules[cls.__module__].siglip(cfg).double()
    expected = alone(pixel_values=batch.values).last_hidden_state.detach().flatten(0, 1)
    return float((found[0] - expected).abs().max()), float(expected.abs().max()), train_few(raw, 2)


@pytest.mark.slow
def test_a_wrapped_siglip_gives_the_features_of_the_model_alone(pictures: Path, ranks: Any) -> None:
    raw = raw_with(SIGLIP, pictures, "vision", train={**small()["train"], "shard": "layer"})
    (expected,) = ranks(1, siglip, raw)
    for layout in ({}, {"vision": {"tp": 2, "sequence_parallel": True}}):
        for difference, size, steps in [expected, *ranks(2, siglip, {**raw, "layout": layout})]:
            assert difference < 1e-12 and size > 0.1
            assert largest_difference(steps, expected[2]) < 1e-9
    assert expected[2][0]["grad_norm_by_module"]["vision"] > 0


def values(raw: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a rank begins with: its part of every parameter and all of every buffer, by name, and the linear
    indices of these elements in the whole."""
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    job = build_job(blueprint, RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    out = {}
    for part in job.parts.get("sensor", {}).values():
        for name, param, spec in declared(part):
            held = held_indices(tuple(param.shape), spec, job.meshes["sensor"])
            out[name] = local(param.detach()).clone(), global_index(tuple(param.shape), held)
        for name, buffer in part.named_buffers():
            out[name] = buffer.clone(), torch.arange(buffer.numel()).view(buffer.shape)
    job.close()
    return out


def learn(raw: dict[str, Any], folder: str, layout: Any, later: Any) -> Any:
    """What a job begins with, its steps, and those after it resumed in another layout."""
    at_first = values({**raw, "layout": layout})
    steps = test_checkpoint.run({**raw, "layout": layout}, folder, 0, 2)
    steps += test_checkpoint.run({**raw, "layout": later}, folder, 2, 3)
    return at_first, steps


WRAPPER = "tests.mm.plugins:Wrapper"
FOUR = [
    ({"sensor": {"ranks": "0-1", "pp": 2}, "llm": {"ranks": "2-3"}}, {"sensor": {"tp": 2}}),
    ({"sensor": {"tp": 2, "sequence_parallel": True}, "llm": {"tp": 2}}, {"sensor": {"pp": 2}}),
]


def test_plain_modules_and_buffers_are_the_same_in_any_layout(
    series: Path, ranks: Any, tmp_path: Path
) -> None:
    raw = raw_with(WRAPPER, series, train={**small()["train"], "steps": 4, "global_batch": 5})
    ((start, expected),) = ranks(1, learn, raw, str(tmp_path / "one"), {}, {})
    whole_ = {name: value for name, (value, _) in start.items()}
    assert torch.equal(whole_["encoder.ramp"], torch.linspace(0.5, 1.5, 8, dtype=torch.float64))
    assert torch.equal(whole_["encoder.offset"], torch.full((8,), 0.25, dtype=torch.float64))
    assert sorted(whole_["encoder.blocks.1.order"].tolist()) == list(range(8))
    assert not torch.equal(whole_["encoder.blocks.0.scale"], whole_["encoder.blocks.1.scale"])
    kept = store.describe(tmp_path / "one" / "step-00000003")
    assert "sensor.encoder.ramp" in kept and "sensor.encoder.offset" not in kept
    for k, (layout, later) in enumerate(FOUR):
        seen = set()
        for found, steps in ranks(4, learn, raw, str(tmp_path / str(k)), layout, later):
            for name, (value, at) in found.items():
                assert torch.equal(value, whole_[name].reshape(-1)[at]), name
            assert largest_difference(steps, expected) < 1e-9
            seen |= set(found)
        assert seen == set(whole_)


def every_dtype(raws: list[dict[str, Any]]) -> list[float]:
    return [train_few(raw, 1)[0]["loss"] for raw in raws]


@pytest.mark.slow
def test_every_example_trains_in_every_dtype(
    series: Path, pictures: Path, tmp_path: Path, ranks: Any
) -> None:
    write_shard(tmp_path / "a.tar", sensor_samples(20, module="touch", shape=(4, 4)))
    examples = [
        ("examples.sensor_encoder:SensorEncoder", series, "sensor"),
        ("examples.touch_encoder:TouchEncoder", tmp_path, "touch"),
        (SIGLIP, pictures, "vision"),
        (WRAPPER, series, "sensor"),
    ]
    raws = [
        raw_with(encoder, folder, name, train={**small()["train"], "dtype": dtype})
        for encoder, folder, name in examples
        for dtype in ("float64", "float32", "bfloat16")
    ]
    for losses in ranks(2, every_dtype, raws):
        for exact, single, half in zip(losses[::3], losses[1::3], losses[2::3], strict=True):
            assert single == pytest.approx(exact, rel=1e-5) and half == pytest.approx(exact, rel=0.02)
            assert single != exact and half != single


def build(encoder: str, pp: int, folder: Path) -> None:
    """The module, as a stage of `pp`, on this process."""
    raw = raw_with(
        f"tests.mm.plugins:{encoder}", folder, layout={"sensor": {"pp": pp, "ranks": f"0-{pp - 1}"}}
    )
    blueprint = draw_up(from_mapping(raw, CONFIGS), pp)
    bare_module(blueprint, "sensor", Axes(), blueprint.stages["sensor"][0])


@pytest.mark.parametrize(
    ("encoder", "pp", "part"),
    [
        (
            "Forgetful",
            1,
            r"plugins:Forgetful: parameter encoder\.extra\.weight was not declared; needed: .*adopt",
        ),
        ("Unkeyed", 2, r"encoder\.extra\.weight was adopted in a stage of a pipeline.*key="),
    ],
)
def test_what_is_not_adopted_is_refused(encoder: str, pp: int, part: str, series: Path) -> None:
    with pytest.raises(Refused, match=part):
        build(encoder, pp, series)
    build("Wrapper", pp, series)


def test_an_adopted_module_keeps_what_it_drew_as_often_as_it_is_made(series: Path) -> None:
    blueprint = draw_up(from_mapping(raw_with(WRAPPER, series), CONFIGS), 1)
    nets = []
    for _ in range(2):
        torch.rand(3)  # what was drawn elsewhere changes nothing, and is changed by nothing
        state = torch.get_rng_state()
        nets.append(bare_module(blueprint, "sensor", Axes(), whole(2), "cpu"))
        assert torch.equal(torch.get_rng_state(), state)
        initialise(nets[-1], 1, "sensor")
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    fixed = [name for name, p in nets[0].named_parameters() if not p.requires_grad]
    assert fixed == ["encoder.blocks.0.shift", "encoder.blocks.1.shift"]  # as they were made


def differing(raw: dict[str, Any]) -> str:
    try:
        train_few(raw, 1)
    except Refused as error:
        return str(error)
    return "trained"


def test_values_that_differ_between_ranks_are_refused(series: Path, ranks: Any) -> None:
    raw = raw_with("tests.mm.plugins:Different", series)
    for message in ranks(2, differing, raw):
        assert "adopted parameters differ between ranks: encoder.extra.weight (1 of" in message


def test_evaluation_leaves_modes_as_they_were() -> None:
    """A wrapped batch norm always is in eval mode; the rest trains on."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2).eval())
    seen: list[list[bool]] = []

    def gather(sums: list[float]) -> np.ndarray:
        seen.append([m.training for m in net.modules()])
        return np.array([sums])

    uses = SimpleNamespace(encoders={})
    cfg = SimpleNamespace(train=SimpleNamespace(global_batch=1))
    job: Any = SimpleNamespace(
        blueprint=SimpleNamespace(inputs=uses, cfg=cfg),
        modules=lambda: [net],
        control=SimpleNamespace(gather=gather),
    )
    data: Any = None
    evaluate._mean_losses(job, data, [], None)
    assert seen == [[True, True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wav2Vec2Model", "SiglipVisionModel"])
def test_a_folder_of_transformers_trains_alike_in_any_layout(
    name: str, pictures: Path, tmp_path: Path, ranks: Any
) -> None:
    """Items of several shapes as one FSDP unit, of one shape by layers; frozen and recomputed too."""
    from tests.encoders.foreign import folder

    made, data = f"hf:{folder(name, tmp_path / 'made')}", pictures if "Vision" in name else tmp_path
    module = "vision" if "Vision" in name else "audio"
    if module == "audio":
        clips(tmp_path)
    raw = raw_with(made, data, module, train={**small()["train"], "shard": "layer"})
    raw["data"]["context"] = 160
    expected = ranks(1, train_few, raw, 3)[0]
    assert expected[0]["grad_norm_by_module"][module] > 0
    raw["train"]["recompute"] = True
    for layout in ({}, {module: {"tp": 2, "sequence_parallel": True}}, {module: {"ranks": "1"}}):
        for steps in ranks(2, train_few, {**raw, "layout": layout}, 3):
            assert largest_difference(steps, expected) < 1e-9
    raw["model"][module]["freeze"] = "encoder"
    frozen = [*ranks(1, train_few, raw, 2), *ranks(2, train_few, raw, 2)]
    assert all(largest_difference(steps, frozen[0]) < 1e-9 for steps in frozen)
    assert largest_difference(frozen[0], expected[:2]) > 1e-6
    for dtype, far in (("float32", 1e-5), ("bfloat16", 0.02)):
        raw["train"]["dtype"] = dtype
        losses = [step["loss"] for step in ranks(2, train_few, raw, 1)[0]]
        assert losses == pytest.approx([expected[0]["loss"]], rel=far) and losses[0] != expected[0]["loss"]
