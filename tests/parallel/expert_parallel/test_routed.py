"""Every rank knows how many tokens the others route, as they find it themselves."""

from __future__ import annotations

from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from parallel.context_parallel import ContextPacking, pack
from parallel.expert_parallel.routed import routed_tokens
from parallel.sequence.stream import Order, alignment
from parallel.topology.axis import Axis
from parallel.topology.layout import Layout, make_layout

DEGREES = st.sampled_from([1, 2, 3, 4])


def routes(layout: Layout, rank: int, tokens: list[int], real: list[int], order: Order) -> int:
    """Tokens that a rank routes, from its packing, as an MoE layer counts them."""
    at, group = layout.coord(rank), Any
    n = real[at.dp]
    if layout.cp > 1:
        packing = pack([n, tokens[at.dp] - n], "cpu", Axis("cp", layout.cp, at.cp, group), order)  # type: ignore[arg-type]
        assert isinstance(packing, ContextPacking)
        n = packing.rows_before(n)
    width = tokens[at.dp] // layout.cp // layout.tp
    return min(max(n - at.tp * width, 0), width)


@given(st.data(), st.fixed_dictionaries({k: DEGREES for k in ("tp", "cp", "pp", "ep", "etp", "edp")}))
def test_routed_tokens_are_those_that_each_rank_finds(data: st.DataObject, n: dict[str, int]) -> None:
    world = n["etp"] * n["ep"] * n["edp"] * n["pp"]
    assume(world // n["pp"] % (n["tp"] * n["cp"]) == 0)
    ranks = data.draw(st.permutations(range(world)))
    degrees = {k: n[k] for k in ("tp", "cp", "pp", "ep", "etp")}
    layout = make_layout("llm", world, {"ranks": ranks, **degrees})
    order: Order = data.draw(st.sampled_from(("contiguous", "zigzag")))
    unit = alignment(layout.cp, layout.tp, order)
    tokens = [unit * data.draw(st.integers(1, 4)) for _ in range(layout.dp)]
    real = [data.draw(st.integers(0, t)) for t in tokens]
    rank = data.draw(st.sampled_from(ranks))
    table = routed_tokens(layout, rank, tokens, real, order)
    mine = layout.peers(rank, ("etp", "ep"))
    for other in mine:
        at = layout.expert_coord(other)
        assert table[at.etp][at.ep] == routes(layout, other, tokens, real, order), (other, layout)
    assert len(table) == layout.etp and all(len(row) == layout.ep for row in table)
