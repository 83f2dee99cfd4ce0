"""What megatron-core 0.19.2's communicators cannot run or get wrong is right here.

docs/layouts.md lists what they do; benchmarks/boundary/gaps.py runs them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.boundary import BoundaryCommunicator
from tests.parallel.boundary.joint import TIMEOUT_S, WORLD, Account, Joint, attempt, check_bytes, planned


def joint(vision: dict[str, Any], llm: dict[str, Any], rows: list[int], **more: Any) -> Joint:
    """Items dealt in turn to the dp ranks of both sides, two tokens apart, unless `more` says otherwise."""
    blank = Joint(vision, llm, rows, source_dp=[], llm_dp=[], position=[], tokens=[])
    source, dest = blank.layouts
    llm_dp = [i % dest.dp for i in range(len(rows))]
    filled, position = [0] * dest.dp, []
    for n, dp in zip(rows, llm_dp, strict=True):
        position.append(filled[dp])
        filled[dp] += n + 2
    # Streams that split over any layout of four ranks.
    tokens = [-(-max(n, 1) // 8) * 8 for n in filled]
    dealt = {"source_dp": [i % source.dp for i in range(len(rows))]} | more
    return Joint(vision, llm, rows, llm_dp=llm_dp, position=position, tokens=tokens, **dealt)


RAGGED = [6, 2, 3, 5]
SP = {"sequence_parallel": True}
GAPS = {
    "disjoint fan-in of ragged rows": joint({"ranks": "0-1"}, {"ranks": "2"}, RAGGED),
    "colocated fan-in of ragged rows": joint({}, {"tp": 2}, RAGGED),
    "colocated fan-out of ragged rows": joint({"tp": 2}, {}, RAGGED),
    "colocated, a rank without items": joint({}, {"tp": 2}, [3, 4], source_dp=[1, 1]),
    "disjoint, a rank without items": joint({"ranks": "0-1"}, {"ranks": "2"}, [3, 4], source_dp=[1, 1]),
    "items without rows": joint({}, {"tp": 4}, [0, 0, 0]),
    "dp 3 to dp 2": joint({"ranks": "0-2"}, {"ranks": "2-3"}, RAGGED),
    "dp 3 to dp 4": joint({"ranks": "0-2"}, {}, RAGGED),
    "a source on some of the destination's ranks": joint({"ranks": "0-1"}, {"tp": 2}, RAGGED),
    "ranks in an order of their own": joint({}, {"ranks": [0, 2, 1, 3]}, RAGGED),
    "ranks that are not neighbours": joint({"ranks": [0, 2]}, {"ranks": [1, 3], "tp": 2}, RAGGED),
    "a source that is sequence-sharded": joint({"ranks": "0-1", "tp": 2} | SP, {"ranks": "2-3"}, RAGGED),
    "encoder cp": joint({"ranks": "0-1", "cp": 2}, {"ranks": "2-3"}, RAGGED),
    "encoder pp": joint({"ranks": "0-1", "pp": 2}, {"ranks": "2-3"}, RAGGED),
    "colocated, encoder pp": joint({"pp": 2}, {"tp": 2}, RAGGED),
    "encoder tp 3": joint({"ranks": "0-2", "tp": 3}, {}, RAGGED),
    "language model cp, zigzag": joint({"ranks": "0-1"}, {"ranks": "2-3", "cp": 2}, RAGGED, order="zigzag"),
    "colocated cp and tp, zigzag, sequence-sharded": joint(
        {}, {"cp": 2, "tp": 2} | SP, RAGGED, order="zigzag"
    ),
    "colocated language model pp": joint({}, {"pp": 2}, RAGGED),
    "rows read by two pipeline stages": joint({}, {"pp": 2}, RAGGED, stages=(0, 1)),
    "nodes of two ranks, each fed once": joint(
        {"ranks": "0"}, {"ranks": "1-3", "tp": 3}, RAGGED, node_size=2
    ),
}


@pytest.mark.parametrize("name", GAPS)
def test_what_the_peer_lacks_is_right_here(ranks: Any, name: str) -> None:
    case = GAPS[name]
    check_bytes(case, ranks(WORLD, attempt, case, timeout=30))


def three_at_once() -> None:
    """Two encoders share ranks apart from the language model, a third is on its ranks."""
    mixed = [
        joint({"ranks": "0-1"}, {"ranks": "2-3", "tp": 2}, RAGGED),
        joint({"ranks": "0-1", "tp": 2}, {"ranks": "2-3", "tp": 2}, [3, 0, 4]),
        joint({"ranks": "2-3"}, {"ranks": "2-3", "tp": 2}, [1, 7]),
    ]
    rank = dist.get_rank()
    communicator = BoundaryCommunicator(dist.group.WORLD, timeout_s=TIMEOUT_S)
    accounts = [Account.of(case) for case in mixed]
    plans = [planned(case)[0] for case in mixed]
    x = [torch.tensor(a.held[rank], dtype=torch.float64) + 100 * k for k, a in enumerate(accounts)]
    under_way = [communicator.start_forward(plan, rows) for plan, rows in zip(plans, x, strict=True)]
    back = []
    for k, (account, pending) in enumerate(zip(accounts, under_way, strict=True)):
        y = pending.wait()
        assert (y - 100 * k).tolist() == account.read[rank]
        back.append(communicator.start_backward(plans[k], 2 * y))  # while the next one arrives
    assert all(torch.equal(grad.wait(), 2 * rows) for grad, rows in zip(back, x, strict=True))


def test_several_encoders_in_mixed_placement_are_under_way_at_once(ranks: Any) -> None:
    ranks(WORLD, three_at_once, timeout=30)
