"""A predicted step: what it adds up to, and how it answers to hardware."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.made_up import made_up_index
from mm.plan.step_plan import StepPlan
from mm.predict.costs import priced
from mm.predict.count.job import count_job
from mm.predict.count.rank import count_rank
from mm.predict.hardware import Hardware, Link, load_hardware
from mm.predict.step import Prediction, Spread, check_room, drawn_plans, predict, shortfall
from mm.ranks.job import open_index
from parallel.schedule.action import COMPUTE, Kind
from tests.mm.harness import CONFIGS, small

H100, CPU = load_hardware("h100"), load_hardware("cpu-gloo")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor and experts": {"llm": {"tp": 2, "ep": 2}},
    "pipeline": {"llm": {"pp": 2, "tp": 2}},
    "apart": {"vision": {"ranks": "0-0"}, "audio": {"ranks": "1-1"}, "llm": {"ranks": "2-3"}},
}


def made(name: str, **more: Any) -> tuple[Blueprint, StepPlan]:
    raw = small(layout=LAYOUTS[name], schedule={"microbatches": 2}, train={"dtype": "float32"}, **more)
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    return blueprint, drawn_plans(blueprint, made_up_index(blueprint), 1)[0]


@pytest.mark.parametrize("hardware", [H100, CPU], ids=lambda h: h.name)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prediction_adds_up(name: str, hardware: Hardware) -> None:
    blueprint, plan = made(name)
    found = predict(blueprint, plan, hardware)
    assert sum(found.breakdown.values()) == pytest.approx(found.step_s)
    assert all(s >= -1e-12 for s in found.breakdown.values())
    assert 0 <= found.bubble_fraction < 1
    assert found.boundary_s <= found.step_s
    assert found.tokens_per_s_per_device == pytest.approx(plan.tokens / found.step_s / 4)
    assert found.peak_memory_bytes == max(sum(kinds.values()) for kinds in found.memory.values())
    assert found.memory_by_kind["reserved"] == hardware.memory.reserved
    what = {what for _, what in found.breakdown}
    assert ("tp" in what) == (blueprint.layouts["llm"].tp > 1)


def test_sums_over_replicas_come_once_a_step() -> None:
    layout = {"llm": {"data_parallel": "hsdp"}, "vision": {"data_parallel": "zero3"}}
    raw = small(layout=layout, schedule={"microbatches": 2}, train={"dtype": "float32"})
    raw["run"] |= {"node_size": 2}
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    plan = drawn_plans(blueprint, made_up_index(blueprint), 1)[0]
    costs = priced(blueprint, plan, count_job(blueprint, plan), H100).costs
    assert 0 < costs.sums["llm"] < costs.transfer["llm", Kind.GRAD_SYNC]
    assert costs.sums["vision"] == costs.transfer["vision", Kind.GRAD_SYNC]


def scaled(hardware: Hardware, factor: float) -> Hardware:
    """All of it `factor` times as slow."""

    def link(x: Link) -> Link:
        return replace(x, bandwidth=x.bandwidth / factor, latency_s=x.latency_s * factor)

    memory = replace(hardware.memory, bandwidth=hardware.memory.bandwidth / factor)
    dtypes = ("bfloat16", "float32", "float64")
    peak = replace(hardware.peak, **{d: getattr(hardware.peak, d) / factor for d in dtypes})
    kernels = replace(hardware.kernels, launch_s=hardware.kernels.launch_s * factor)
    across = None if hardware.links.across is None else link(hardware.links.across)
    links = replace(hardware.links, inside=link(hardware.links.inside), across=across)
    host = hardware.host
    if host is not None:
        names = ("collective_s", "message_s", "byte_s", "unit_s", "step_s")
        host = replace(host, **{n: getattr(host, n) * factor for n in names})
    return replace(hardware, memory=memory, peak=peak, kernels=kernels, links=links, host=host)


@pytest.mark.parametrize("hardware", [H100, CPU], ids=lambda h: h.name)
def test_hardware_that_is_three_times_as_slow_takes_three_times_as_long(hardware: Hardware) -> None:
    blueprint, plan = made("pipeline")
    fast, slow = (predict(blueprint, plan, h) for h in (hardware, scaled(hardware, 3.0)))
    assert slow.step_s == pytest.approx(3 * fast.step_s)
    for key, seconds in fast.breakdown.items():
        assert slow.breakdown[key] == pytest.approx(3 * seconds, abs=1e-9)


def test_more_cores_help_up_to_one_a_rank() -> None:
    blueprint, plan = made("data")
    assert CPU.host is not None
    seconds = [
        predict(blueprint, plan, replace(CPU, host=replace(CPU.host, cores=n))).timeline.seconds
        for n in (1, 2, 4, 8)
    ]
    assert seconds[0] > seconds[1] > seconds[2]
    assert seconds[3] == pytest.approx(seconds[2])


def test_a_link_across_nodes_that_is_slower_makes_the_step_longer() -> None:
    blueprint, plan = made("tensor and experts", run={"node_size": 1, "seed": 0})
    assert H100.links.across is not None
    slow = replace(H100.links.across, bandwidth=H100.links.across.bandwidth / 100)
    fast, slower = (
        predict(blueprint, plan, replace(H100, links=replace(H100.links, across=a)))
        for a in (H100.links.across, slow)
    )
    assert slower.step_s > fast.step_s
    assert slower.breakdown["llm", "tp"] > fast.breakdown["llm", "tp"]
    with pytest.raises(Refused, match=r"cpu-gloo has no links\.across"):
        predict(blueprint, plan, replace(CPU, host=None))


def test_ragged_steps_differ_and_their_mean_is_between() -> None:
    blueprint, _ = made("data")
    index = open_index(blueprint, ["data/digits-train-*.tar"], CONFIGS, write=False)
    found = Spread([predict(blueprint, plan, CPU) for plan in drawn_plans(blueprint, index, 3)])
    seconds = [p.step_s for p in found.steps]
    assert min(seconds) < found.mean_s < max(seconds)
    assert 0 < found.jitter_s < max(seconds) - min(seconds)


def test_what_does_not_fit_is_said_with_the_numbers() -> None:
    blueprint, plan = made("data")
    found: Prediction = predict(blueprint, plan, H100)
    assert shortfall(found, H100) is None
    tight = replace(H100, memory=replace(H100.memory, bytes=4.001e9))
    why = shortfall(found, tight)
    assert why is not None and why.startswith("needs 4.0 GB on rank ") and "h100 has 4.0 GB a device" in why
    # An engine whose own figure of a peak leaves out what is no tensor has no more room for that.
    bare = replace(found, memory={r: {**kinds, "reserved": 0.0} for r, kinds in found.memory.items()})
    assert shortfall(bare, tight) == why
    check_room(81e9 * 4, 4, H100)
    with pytest.raises(
        Refused, match=r"need 1630\.0 GB; 4 h100 have 326\.0 GB, 81\.5 each; needed: at least 20"
    ):
        check_room(1630e9, 4, H100)


def test_experts_exchanges_are_counted_once() -> None:
    blueprint, plan = made("tensor and experts")
    counts = count_job(blueprint, plan)
    found = priced(blueprint, plan, counts, H100)
    for a in (a for _, a in blueprint.schedule(plan.active) if a.kind in COMPUTE and a.module == "llm"):
        load = found.costs.load[a.module, a.microbatch]
        one = found.prices[a.module, a.stage, a.kind]
        assert one.exchanges
        assert found.costs.seconds(a) == pytest.approx(one.seconds * load)


def test_launches_do_not_grow_with_the_load() -> None:
    blueprint, plan = made("data")
    counts = count_job(blueprint, plan)
    load = {key: 1.0 if key[1] else 3.0 for key in counts.load}
    free = replace(H100, kernels=replace(H100.kernels, launch_s=0.0))
    dear = replace(H100, kernels=replace(H100.kernels, launch_s=1.0))
    for hardware, ratio in ((free, 3.0), (dear, 1.0)):
        found = priced(blueprint, plan, replace(counts, load=load), hardware).costs.load
        assert found["llm", 0] / found["llm", 1] == pytest.approx(ratio, rel=0.01)


def test_memory_is_that_of_the_rank_with_the_data() -> None:
    raw = small(train={"dtype": "float32", "global_batch": 1}, schedule={"microbatches": 1})
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    plan = drawn_plans(blueprint, made_up_index(blueprint), 1)[0]
    found = predict(blueprint, plan, CPU)
    peaks = [count_rank(blueprint, plan, rank, host=True).peak for rank in range(4)]
    assert max(peaks) > 1.1 * min(peaks)
    assert found.peak_memory_bytes == pytest.approx(max(peaks))
