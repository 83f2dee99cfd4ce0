"""Collectives: bytes over bandwidth where they are long, latency where they are short, shared NICs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import Refused
from mm.predict.hardware import Host, load_hardware
from mm.predict.links import Place, Places, message_seconds, processor_seconds
from mm.predict.work import Message
from parallel.topology.groups import Group, group_plan
from parallel.topology.layout import make_layout

H100 = load_hardware("h100")
NEAR = H100.links.inside.bandwidth * H100.links.inside.efficiency
assert H100.links.across is not None
FAR = H100.links.across.bandwidth * H100.links.across.efficiency
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
TP = Group("module", "llm", "tp")


def seconds(op: str, size: float, place: Place) -> float:
    return message_seconds(Message(op, TP, size), place, H100)


@pytest.mark.parametrize(
    ("op", "place", "expected"),
    [
        ("all_gather", Place(8, 1, 8), 7 / 8 / NEAR),
        ("all_reduce", Place(8, 1, 8), 14 / 8 / NEAR),
        ("all_to_all", Place(4, 1, 4), 3 / 4 / NEAR),
        ("send", Place(2, 1, 2), 1 / NEAR),
        ("send", Place(2, 2, 1, 8), 1 / FAR),
        # A rank a node: all that it lacks comes over its NIC.
        ("all_gather", Place(4, 4, 1, 8), 3 / 4 / FAR),
        # Eight ranks a node: each fetches an eighth of what the node lacks.
        ("all_gather", Place(16, 2, 8, 8), max(1 / 2 / 8 / FAR, 15 / 16 / NEAR)),
        # In an all-to-all each has rows of its own.
        ("all_to_all", Place(16, 2, 8, 8), 1 / 2 / FAR),
        ("all_reduce", Place(1), 0),
    ],
)
def test_long_messages_take_their_bytes_over_the_bandwidth(op: str, place: Place, expected: float) -> None:
    size = 1e12
    assert seconds(op, size, place) == pytest.approx(expected * size, rel=1e-3)


def test_devices_that_send_at_once_share_their_nodes_nics() -> None:
    across = H100.links.across
    assert across is not None
    few = replace(H100, links=replace(H100.links, across=replace(across, nics=2)))
    message = Message("send", TP, 1e12)
    alone, crowd = (message_seconds(message, Place(2, 2, 1, n), few) for n in (2, 8))
    assert crowd == pytest.approx(4 * alone, rel=1e-3)


@given(
    st.sampled_from(OPS),
    st.sampled_from([Place(2, 1, 2), Place(8, 1, 8), Place(4, 4, 1, 8), Place(64, 8, 8, 8)]),
    st.floats(0, 1e9),
    st.floats(1, 1e9),
)
def test_more_bytes_take_longer_and_nodes_cost(op: str, place: Place, size: float, more: float) -> None:
    assert 0 < seconds(op, size, place) < seconds(op, size + more, place)
    one_node = Place(place.ranks, 1, place.ranks)
    if op in ("all_to_all", "send"):  # rings over several nodes have fewer hops than one over as many ranks
        assert seconds(op, size, place) >= seconds(op, size, one_node)


def test_groups_are_found_on_their_nodes() -> None:
    llm = make_layout("llm", 16, {"tp": 4, "pp": 2})
    places = Places.of(group_plan({"llm": llm}, world=16, sink="llm"), 8)
    assert places.of_group(TP) == Place(4, 1, 4)
    assert places.of_group(Group("module", "llm", "data")) == Place(2, 1, 2)
    assert places.of_group(Group("module", "llm", "pp", "forward")) == Place(2, 2, 1, 8)
    assert places.of_group(Group("module", "llm", "ep")) == Place(1)
    assert Places.of(places.groups, None).of_group(Group("module", "llm", "pp", "forward")).nodes == 1


def test_hardware_of_one_node_refuses_what_crosses_nodes() -> None:
    with pytest.raises(
        Refused, match=r"cpu-gloo has no links\.across, but all_reduce of llm\.tp joins 2 nodes"
    ):
        message_seconds(Message("all_reduce", TP, 1.0), Place(4, 2, 2, 2), load_hardware("cpu-gloo"))


def test_a_message_costs_processor_seconds_at_both_ends() -> None:
    host = Host(2, 1e-3, 1e-4, 1e-9, 0, 0, "made up")
    assert processor_seconds(Message("send", TP, 1e6), 2, host) == pytest.approx(1e-4 + 1e-3)
    # Three messages of a quarter out, three in.
    expected = 1e-3 + 6e-4 + 2 * 0.75e-3
    assert processor_seconds(Message("all_gather", TP, 1e6), 4, host) == pytest.approx(expected)
    assert processor_seconds(Message("all_gather", TP, 1e6), 1, host) == 0
