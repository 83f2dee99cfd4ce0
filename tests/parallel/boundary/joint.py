"""One boundary between two layouts, carried out and held against an account of single rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.boundary import (
    BoundaryCommunicator,
    EdgePlan,
    dest_side,
    plan_edge,
    row_positions,
    source_side,
)
from parallel.sequence.stream import Order
from parallel.topology.layout import Layout, make_layout
from tests.parallel.boundary.cases import held_rows, local_tokens
from tests.parallel.boundary.counter import Counter

WORLD = 4
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Joint:
    """Two modules' layout keys, and the items between them. wrong: why it has to be refused, if it does."""

    vision: dict[str, Any]
    llm: dict[str, Any]
    rows: list[int]
    lane: list[int]
    llm_lane: list[int]
    position: list[int]
    tokens: list[int]
    order: Order = "contiguous"
    stages: tuple[int, ...] = (0,)
    node_size: int | None = None
    dtype: torch.dtype = torch.float64
    tail: tuple[int, ...] = (2,)
    transport: str = "p2p"
    wrong: str = ""

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        return make_layout("vision", WORLD, self.vision), make_layout("llm", WORLD, self.llm)


@dataclass(frozen=True)
class Account:
    """Who has and who reads which rows, and what must move, from lists of single rows.

    held, read: rank -> global rows in local order; positions: rank -> local tokens of the rows that it reads;
    consumers: the ranks of each, with their rows and pipeline stage.
    """

    held: dict[int, list[int]]
    read: dict[int, list[int]]
    positions: dict[int, list[int]]
    consumers: list[tuple[set[int], set[int], int]]

    @staticmethod
    def of(joint: Joint) -> Account:
        vision, llm = joint.layouts
        held: dict[int, list[int]] = {r: [] for r in range(WORLD)} | held_rows(vision, joint.rows, joint.lane)
        row_at: list[dict[int, int]] = [{} for _ in joint.tokens]
        total = 0
        for n, lane, at in zip(joint.rows, joint.llm_lane, joint.position, strict=True):
            row_at[lane] |= {at + k: total + k for k in range(n)}
            total += n
        read: dict[int, list[int]] = {r: [] for r in range(WORLD)}
        positions: dict[int, list[int]] = {r: [] for r in range(WORLD)}
        consumers: dict[tuple[int, ...], tuple[set[int], set[int], int]] = {}
        for rank, tokens in local_tokens(llm, joint.tokens, joint.order).items():
            at = llm.coord(rank)
            for stage in joint.stages:
                same = llm.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=stage)
                positions[same] = [k for k, t in enumerate(tokens) if t in row_at[at.dp]]
                read[same] = [row_at[at.dp][tokens[k]] for k in positions[same]]
                key = (stage, at.dp, at.cp, at.tp if llm.sequence_parallel else 0)
                ranks, rows, _ = consumers.setdefault(key, (set(), set(read[same]), stage))
                assert rows == set(read[same]), "replicas read the same"
                ranks.add(same)
        return Account(held, read, positions, list(consumers.values()))

    def least(self, node_size: int) -> list[int]:
        """Rows received, then those that cross nodes: forward, backward."""
        nodes = [range(low, min(low + node_size, WORLD)) for low in range(0, WORLD, node_size)]
        have, want = ({r: set(rows) for r, rows in side.items()} for side in (self.held, self.read))

        def missing(have: dict[int, set[int]], want: dict[int, set[int]]) -> int:
            anyone = set().union(*have.values())
            return sum(len((want[r] & anyone) - have[r]) for r in want)

        def by_node(of: dict[int, set[int]]) -> dict[int, set[int]]:
            return {k: set().union(*(of[r] for r in node)) for k, node in enumerate(nodes)}

        forward, backward = [missing(have, want), missing(by_node(have), by_node(want))], [0, 0]
        for ranks, rows, _ in self.consumers:
            gradient = {r: rows if r in ranks else set() for r in range(WORLD)}
            backward[0] += missing(gradient, have)
            backward[1] += missing(by_node(gradient), by_node(have))
        return forward + backward


def planned(joint: Joint) -> tuple[EdgePlan, list[int]]:
    """This rank's plan, and the local tokens of the rows that it reads. ValueError for a wrong case."""
    rank = dist.get_rank()
    vision, llm = joint.layouts
    source = source_side(vision, joint.rows, joint.lane)
    items = (joint.rows, joint.llm_lane, joint.position, joint.tokens)
    dest = dest_side(llm, *items, order=joint.order, stages=joint.stages)
    reads = rank in llm.ranks and llm.coord(rank).pp in joint.stages
    positions = row_positions(llm, rank, *items, order=joint.order).tolist() if reads else []
    return plan_edge("vision -> llm", source, dest, rank, node_size=joint.node_size), positions


def attempt(joint: Joint) -> str | list[int]:
    """Why a case is refused, or what this rank sent: [forward, of it across nodes, backward, of it ..]."""
    try:
        plan, positions = planned(joint)
    except ValueError as error:
        return str(error)
    account = Account.of(joint)
    assert positions == account.positions[dist.get_rank()]
    communicator = BoundaryCommunicator(dist.group.WORLD, transport=joint.transport, timeout_s=TIMEOUT_S)
    return play(joint, account, plan, communicator)


def check_bytes(joint: Joint, found: list[list[int]]) -> None:
    """What all ranks sent is the least, in all and across nodes, both ways."""
    row = math.prod(joint.tail) * joint.dtype.itemsize
    least = Account.of(joint).least(joint.node_size or 1)
    assert [sum(sent) for sent in zip(*found, strict=True)] == [n * row for n in least], joint


def play(joint: Joint, account: Account, plan: EdgePlan, comm: BoundaryCommunicator) -> list[int]:
    """Forward and backward of one case, checked against the account; bytes sent."""
    rank = dist.get_rank()
    noise = torch.Generator().manual_seed(sum(joint.rows))
    value = torch.randn(sum(joint.rows), *joint.tail, generator=noise).to(joint.dtype)
    x = value[account.held[rank]].requires_grad_()
    with Counter(joint.node_size or 1) as forward:
        y = comm.exchange(plan, x)
    assert torch.equal(y, value[account.read[rank]]), (joint, "forward")
    assert torch.equal(comm.exchange(plan, x), y), (joint, "forward again")
    # Gradients of small whole numbers: sums over stages are exact in every dtype.
    stage = next((s for ranks, _, s in account.consumers if rank in ranks), 0)
    unit = (torch.arange(sum(joint.rows)) % 3 + 1).reshape(-1, *(1 for _ in joint.tail)).expand_as(value)
    whole = torch.zeros(value.shape, dtype=torch.int64)
    for _, rows, s in account.consumers:
        index = sorted(rows)
        whole[index] += unit[index] << s
    grad = (unit[account.read[rank]] << stage).to(joint.dtype)
    with Counter(joint.node_size or 1) as backward:
        (back,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    assert torch.equal(back, whole[account.held[rank]].to(joint.dtype)), (joint, "backward")
    # Any gradients: twice the same bits, and near their sum.
    noisy = value[account.read[rank]] * (stage + 1)
    twice = [torch.autograd.grad(y, x, noisy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice), (joint, "backward again")
    times = torch.zeros(value.shape)
    for _, rows, s in account.consumers:
        times[sorted(rows)] += s + 1
    torch.testing.assert_close(
        twice[0], (value * times.to(joint.dtype))[account.held[rank]], rtol=0.05, atol=0
    )
    return [forward.bytes, forward.crossing, backward.bytes, backward.crossing]
