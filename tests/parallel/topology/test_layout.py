"""Layouts: coordinates, groups, folding of the expert view, and refusals whose advice works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.topology.layout import (
    AXES,
    DEGREES,
    Layout,
    View,
    check_divides,
    make_layout,
    parse_ranks,
)

SMALL = st.sampled_from([1, 1, 2, 3])
VIEWS: tuple[View, ...] = ("dense", "expert")


@st.composite
def layouts(draw: Any) -> Layout:
    tp, cp, pp, ep, etp = (draw(SMALL) for _ in range(5))
    dense, expert = tp * cp, etp * ep
    size = pp * dense * expert * draw(st.sampled_from([1, 2]))
    start = draw(st.integers(0, 5))
    ranks = draw(st.permutations(range(start, start + size)))
    return Layout("m", tuple(ranks), tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


@given(layouts())
def test_rank_at_inverts_coord(layout: Layout) -> None:
    for rank in layout.ranks:
        c = layout.coord(rank)
        assert layout.rank_at(tp=c.tp, cp=c.cp, dp=c.dp, pp=c.pp) == rank
        assert all(0 <= i < n for i, n in zip(c, layout.shape(), strict=True))


@given(layouts())
def test_groups_partition_the_ranks_and_have_the_degree_as_size(layout: Layout) -> None:
    for view in VIEWS:
        for axis in AXES[view]:
            groups = layout.groups(axis)
            assert sorted(r for g in groups for r in g) == sorted(layout.ranks)
            assert {len(g) for g in groups} == {getattr(layout, axis)}
            assert all(layout.peers(g[-1], axis) == g for g in groups[:3])


@given(layouts())
def test_a_rank_differs_from_its_peers_in_that_axis_only(layout: Layout) -> None:
    for axis in AXES["dense"]:
        for group in layout.groups(axis):
            coords = [layout.coord(r)._asdict() for r in group]
            assert [c.pop(axis) for c in coords] == list(range(len(group)))
            assert all(c == coords[0] for c in coords)


@given(layouts())
def test_groups_of_two_axes_are_unions_of_groups_of_one(layout: Layout) -> None:
    both = layout.groups(("tp", "dp"))
    assert {len(g) for g in both} == {layout.tp * layout.dp}
    for single in (*layout.groups("tp"), *layout.groups("dp")):
        assert sum(set(single) <= set(g) for g in both) == 1


@given(layouts())
def test_both_views_put_the_same_ranks_on_each_stage(layout: Layout) -> None:
    for rank in layout.ranks:
        assert layout.coord(rank).pp == layout.expert_coord(rank).pp
    stages = tuple(layout.stage_ranks(k) for k in range(layout.pp))
    assert stages == layout.groups(("tp", "cp", "dp")) == layout.groups(("etp", "ep", "edp"))
    assert all(layout.coord(r).pp == k for k, stage in enumerate(stages) for r in stage)


def test_axes_run_tp_cp_dp_pp_and_etp_ep_edp_pp_fastest_first() -> None:
    layout = Layout("llm", tuple(range(16)), tp=2, cp=2, pp=2, ep=4, etp=2)
    assert (layout.dp, layout.edp) == (2, 1)
    assert layout.groups("tp")[0] == (0, 1)
    assert layout.groups("cp")[0] == (0, 2)
    assert layout.groups("dp")[0] == (0, 4)
    assert layout.groups("pp")[0] == (0, 8)
    assert layout.groups("etp")[0] == (0, 1)
    assert layout.groups("ep")[0] == (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("spec", "ranks"),
    [
        ("all", (0, 1, 2, 3)),
        ("0-3", (0, 1, 2, 3)),
        ("0-0", (0,)),
        ("1 - 2", (1, 2)),
        ("2", (2,)),
        (3, (3,)),
        ([2, 0], (2, 0)),
    ],
)
def test_ways_to_name_ranks(spec: Any, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(spec, 4, "llm") == ranks


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "0-7",
            "(0-3); needed: ranks below 4, or a job of at least 8 ranks; nearest: ranks=all",
        ),
        (
            "0-99999999999999",
            "(0-3); needed: ranks below 4, or a job of at least 100000000000000 ranks; nearest: ranks=all",
        ),
        ("first", "needed: all, a number, a-b such as 0-3, or a list"),
        ("-1", "needed: all"),
        (-1, "ranks count from 0"),
        ([0, -1], "ranks count from 0"),
        (True, "needed: all"),
        (None, "needed: all"),
        (1.5, "needed: all"),
        ([0, "1"], "needed: all"),
        ([], "names no rank"),
        ("3-1", "names no rank"),
        ([0, 1, 0], "names a rank twice; nearest: ranks=[0,1] or ranks=all"),
    ],
)
def test_ranks_are_refused_in_words(spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^layout\.llm\.ranks") as caught:
        parse_ranks(spec, 4, "llm")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"tp": 3}, "tp=3 needs a multiple of 3 ranks, given 4; nearest: tp=4 or tp=2"),
        ({"tp": 2, "pp": 4}, "tp=2 x pp=4 needs a multiple of 8 ranks, given 4; nearest: "),
        ({"ep": 8}, "ep=8 needs a multiple of 8 ranks, given 4; nearest: ep=4"),
        ({"tpp": 2}, "unknown key layout.llm.tpp; did you mean"),
        ({"colour": 2}, "known keys: ranks, tp"),
        ({"tp": 0}, "layout.llm.tp is 0; needed: a whole number of at least 1"),
        ({"tp": True}, "layout.llm.tp is True"),
        ({"tp": "2"}, "layout.llm.tp is '2'"),
        ({"vpp": 2}, "vpp=2 needs pp > 1, given pp=1; nearest: "),
        ({"sequence_parallel": "yes"}, "needed: true or false"),
    ],
)
def test_layouts_are_refused_in_words(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_layout("llm", 4, spec)
    assert words in str(caught.value)


@given(st.integers(1, 48), st.fixed_dictionaries(dict.fromkeys(DEGREES, st.integers(1, 9))))
def test_the_nearest_layout_that_is_named_works(world: int, spec: dict[str, int]) -> None:
    try:
        make_layout("llm", world, spec)
    except ValueError as error:
        advice = str(error).partition("nearest: ")[2]
        for changes in advice.split(" or "):
            make_layout("llm", world, spec | {n: int(d) for n, d in re.findall(r"(\w+)=(\d+)", changes)})


def test_advice_for_many_ranks_is_quick() -> None:
    with pytest.raises(ValueError, match="nearest: "):
        make_layout("llm", 10080, {"tp": 11, "cp": 13, "ep": 17, "etp": 19})


def test_sequence_parallel_at_tp_1_is_legal() -> None:
    assert make_layout("vision", 2, {"sequence_parallel": True}).tp == 1


@given(st.integers(1, 64), st.integers(1, 70))
def test_a_degree_that_does_not_divide_is_refused_with_ones_that_do(n: int, d: int) -> None:
    if n % d == 0:
        check_divides("heads", n, "tp", d)
        return
    with pytest.raises(
        ValueError, match=rf"heads is {n}, which does not divide by tp={d}; nearest: tp="
    ) as caught:
        check_divides("heads", n, "tp", d)
    works = [int(k) for k in re.findall(r"tp=(\d+)", str(caught.value))[1:]]
    assert works and all(n % k == 0 for k in works)
