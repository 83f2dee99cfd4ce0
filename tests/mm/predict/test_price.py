"""Kernels and what a rank does in an action, in seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import Refused
from mm.predict.hardware import Curve, Hardware, load_hardware
from mm.predict.links import Places
from mm.predict.price import kernel_seconds, price
from mm.predict.work import Kernel, Message, Work
from parallel.topology.groups import Group, group_plan
from parallel.topology.layout import make_layout

H100 = load_hardware("h100")
PLACES = Places.of(group_plan({"llm": make_layout("llm", 8, {"tp": 2, "ep": 4})}, world=8, sink="llm"), None)


def product(m: int, n: int, k: int, times: float = 1.0) -> Kernel:
    return Kernel("product", (m, n, k), "bfloat16", 2.0 * m * n * k, 2.0 * (m * k + k * n + m * n), times)


def test_a_large_product_is_bound_by_the_peak_and_a_thin_one_by_memory() -> None:
    share = H100.kernels.product.at(8192)
    expected = 2 * 8192**3 / (989.4e12 * share)
    assert kernel_seconds(product(8192, 8192, 8192), H100) == pytest.approx(expected)
    thin = product(1, 8192, 8192)
    rate = H100.memory.bandwidth * H100.memory.efficiency
    assert kernel_seconds(thin, H100) == pytest.approx(thin.bytes / rate)


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [("grouped", (4, 1024, 300, 500), 256), ("attention", (8, 700, 900, 64), 700), ("convolution", (), 1)],
)
def test_each_class_has_a_curve_of_its_own_by_a_size_of_its_own(kind: Any, shape: Any, size: float) -> None:
    curves = {k: Curve((0.9,), "made up") for k in ("product", "grouped", "attention", "convolution")}
    curves[kind] = Curve((0.01, 0.03), "made up", (size - 1, size)) if shape else Curve((0.01,), "made up")
    hardware = replace(H100, kernels=replace(H100.kernels, **curves))
    low = kernel_seconds(Kernel(kind, shape, "bfloat16", 1e15, 0.0), hardware)
    assert low == pytest.approx(1e15 / 989.4e12 / (0.03 if shape else 0.01), rel=1e-6)


def test_a_dtype_without_peak_is_refused_where_there_are_products_only() -> None:
    cpu = load_hardware("cpu-gloo")
    assert kernel_seconds(Kernel("memory", (), "", 0.0, 8.0), cpu) > 0
    with pytest.raises(Refused, match="no peak for float8"):
        kernel_seconds(Kernel("product", (1, 1, 1), "float8", 2.0, 3.0), cpu)


@given(st.integers(0, 5), st.integers(0, 3), st.floats(1, 1e8))
def test_an_actions_seconds_are_the_sum_of_its_parts(kernels: int, exchanges: int, size: float) -> None:
    tp, ep = Group("module", "llm", "tp"), Group("module", "llm", "ep")
    messages = (Message("all_reduce", tp, size, 2), Message("all_to_all", ep, size, exchanges))
    made = price(Work((product(256, 256, 256, kernels),), messages), PLACES, H100)
    assert made.seconds == pytest.approx(sum(made.by.values()))
    assert made.by["launch"] == pytest.approx(kernels * H100.kernels.launch_s)
    assert len(made.exchanges) == exchanges
    assert sum(made.exchanges) == pytest.approx(made.by["ep"])
    assert 0 < made.fixed < made.seconds or (kernels == 0 and made.fixed <= made.seconds)


def test_messages_of_ranks_that_share_cores_cost_processor_seconds() -> None:
    cpu: Hardware = load_hardware("cpu-gloo")
    assert cpu.host is not None
    tp = Group("module", "llm", "tp")
    one = price(Work((), (Message("all_reduce", tp, 0.0),)), PLACES, cpu)
    assert one.seconds == pytest.approx(cpu.host.collective_s + 4 * cpu.host.message_s)
