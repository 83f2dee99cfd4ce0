"""What megatron-core's communicators do in cases outside their reach, beside this project's: run and seen.

    PYTHONPATH=peers/megatron python -m benchmarks.boundary.gaps

Rows go forward and their negatives back, and every rank checks all of its own: exact, wrong rows, wrong
gradients, or the first error that is not another rank's. Ranks that hang are replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.boundary import peer
from benchmarks.boundary.peer import Layout
from parallel.boundary import BoundaryCommunicator, RowMap, plan_edge, source_side
from parallel.topology.layout import make_layout
from tests.pool import Pool, RankFailed

TIMEOUT_S = 15.0
IMPORT_S = 300.0  # the peer's import, in workers that are fresh


@dataclass(frozen=True)
class Gap:
    """One case: both sides as the peer writes them, items with their rows and dp ranks, and layout keys that
    the peer has no words for."""

    source: Layout
    dest: Layout
    rows: list[int]
    source_lane: list[int]
    dest_lane: list[int]
    source_keys: dict[str, Any] = field(default_factory=dict)
    dest_keys: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return max(max(self.source.ranks), max(self.dest.ranks)) + 1

    def side(self, name: str) -> RowMap:
        """Our rows of "source" or "dest", items end to end."""
        layout: Layout = getattr(self, name)
        keys = {"ranks": list(layout.ranks), "tp": layout.tp, "cp": layout.cp, "pp": layout.pp}
        ours = make_layout(name, self.world, keys | getattr(self, f"{name}_keys"))
        return source_side(ours, self.rows, getattr(self, f"{name}_lane"))


CASES = {
    "equal rows, for comparison": Gap(Layout(1, 4), Layout(2, 2), [4] * 4, [0, 1, 2, 3], [0, 0, 1, 1]),
    "colocated fan-in of ragged rows": Gap(
        Layout(1, 4), Layout(2, 2), [6, 2, 3, 5], [0, 1, 2, 3], [0, 0, 1, 1]
    ),
    "colocated fan-out of ragged rows": Gap(
        Layout(2, 2), Layout(1, 4), [6, 2, 3, 5], [0, 0, 1, 1], [0, 1, 2, 3]
    ),
    "colocated, a rank without items": Gap(Layout(1, 4), Layout(2, 2), [4, 4, 4], [0, 1, 2], [0, 0, 1]),
    "disjoint fan-in of ragged rows": Gap(Layout(1, 2), Layout(1, 1, 2), [6, 2], [0, 1], [0, 0]),
    "disjoint, a rank without items": Gap(Layout(1, 2), Layout(1, 1, 2), [4], [1], [0]),
    "dp 3 to dp 2": Gap(Layout(1, 3), Layout(1, 2, 3), [2] * 6, [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]),
    "a source on some of the destination's ranks": Gap(Layout(1, 2), Layout(2, 2), [4, 4], [0, 1], [0, 1]),
    "ranks in an order of their own": Gap(
        Layout(1, 4),
        Layout(2, 2, axes=("dp", "cp", "pp", "tp")),
        [4] * 4,
        [0, 1, 2, 3],
        [0, 0, 1, 1],
        dest_keys={"ranks": [0, 2, 1, 3]},
    ),
    "a source that is sequence-sharded": Gap(
        Layout(2, 1), Layout(1, 2, 2), [4, 4], [0, 0], [0, 1], source_keys={"sequence_parallel": True}
    ),
    "encoder cp": Gap(Layout(1, 1, cp=2), Layout(1, 2, 2), [4, 4], [0, 0], [0, 1]),
    "colocated, encoder pp": Gap(Layout(1, 2, pp=2), Layout(2, 2), [4, 4], [0, 1], [0, 1]),
}


def rows_of(side: RowMap, rank: int) -> list[int]:
    """Global rows of a rank, in local order."""
    lane = side.lane_of(rank)
    runs = zip(
        side.local.tolist(), side.start.tolist(), side.length.tolist(), side.lane.tolist(), strict=True
    )
    return [r for _, start, n, k in sorted(runs) if k == lane for r in range(start, start + n)]


def outcome(name: str, party: str) -> str:
    """What this rank sees of a case: exact, wrong rows, wrong gradients, or an error's words."""
    torch.set_num_threads(1)
    gap, rank = CASES[name], dist.get_rank()
    full = (torch.arange(sum(gap.rows)) + 1.0)[:, None].expand(-1, 4).contiguous()
    mine, theirs = (full[rows_of(gap.side(side), rank)] for side in ("source", "dest"))
    try:
        y, back = (own if party == "own" else other)(gap, mine, -theirs)()
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    if not torch.equal(y.detach(), theirs):
        return "wrong rows"
    return "exact" if torch.equal(back, -mine) else "wrong gradients"


def load() -> None:
    """Import what the peer needs."""
    import megatron.core.models.mimo.comm.colocated_communicator
    import megatron.core.pipeline_parallel.bridge_communicator  # noqa: F401


def own(gap: Gap, x: torch.Tensor, grad: torch.Tensor) -> peer.Step:
    assert dist.group.WORLD is not None
    communicator = BoundaryCommunicator(dist.group.WORLD, timeout_s=TIMEOUT_S)
    plan = plan_edge("gap", gap.side("source"), gap.side("dest"), dist.get_rank())
    x = x.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = communicator.exchange(plan, x)
        return y, torch.autograd.grad(y, x, grad)[0]

    return step


def other(gap: Gap, x: torch.Tensor, grad: torch.Tensor) -> peer.Step:
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    # Its groups are remembered by class, past the life of the process groups that they were made in.
    BridgeCommunicator._broadcast_pg_cache.clear()
    BridgeCommunicator._bridge_pg_cache.clear()
    apart = not set(gap.source.ranks) & set(gap.dest.ranks)
    make = peer.megatron_disjoint if apart else peer.megatron_colocated
    return make(gap.source, gap.dest, x, grad)


def verdict(pool: Pool, name: str, party: str) -> str:
    """An error that does not come from waiting for another rank, or else the worst that was seen."""
    pool.run(CASES[name].world, load, timeout=IMPORT_S)
    try:
        seen = pool.run(CASES[name].world, outcome, name, party, timeout=TIMEOUT_S)
    except RankFailed as error:
        return "crashes" if "died" in str(error) else "hangs"
    errors = [s for s in seen if s not in ("exact", "wrong rows", "wrong gradients")]
    waits = ("timed out", "timeout", "connection closed", "connection reset", "socket", "no answer")
    told = [s for s in errors if not any(word in s.lower() for word in waits)]
    if errors:
        return told[0] if told else "hangs"
    return " and ".join(sorted({s for s in seen if s != "exact"})) or "exact"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", default="", help="run the cases with this in their name")
    args = parser.parse_args()
    if peer.version() is None:
        raise SystemExit("megatron-core is not importable; see benchmarks/README.md")
    print(f"{'case':46} {'here':8} megatron-core {peer.version()}")
    pool = Pool()
    try:
        for name in CASES:
            if args.only in name:
                print(f"{name:46} {verdict(pool, name, 'own'):8} {verdict(pool, name, 'peer')}", flush=True)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
