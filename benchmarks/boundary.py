"""Races the boundary against megatron-core's communicators, or torch's all-gather where that is absent.

    python benchmarks/boundary.py --launches 3                  # drives torchrun, medians of launches
    torchrun --standalone --nproc-per-node 4 benchmarks/boundary.py --rows 4096 --hidden 1024

Four ranks, forward and backward, own and peer in turn (A B A B ..) in one process group; the ratio is of
minima. benchmarks/README.md says how to have megatron-core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.boundary_peer import Peer, all_gather_peer, megatron_peer
from parallel.boundary import BoundaryCommunicator, RowMap, plan_edge

# name: (source tp, source dp, destination tp, destination dp, destination cut by sequence, disjoint)
CASES = {
    "colocated dp4 -> tp2 dp2": (1, 4, 2, 2, False, False),
    "colocated dp4 -> tp2 dp2, sequence-sharded": (1, 4, 2, 2, True, False),
    "colocated dp4 -> tp4": (1, 4, 4, 1, False, False),
    "colocated dp4 -> tp4, sequence-sharded": (1, 4, 4, 1, True, False),
    "colocated tp2 dp2 -> dp4": (2, 2, 1, 4, False, False),
    "colocated tp4 -> dp4": (4, 1, 1, 4, False, False),
    "colocated tp2 dp2 -> tp2 dp2": (2, 2, 2, 2, False, False),
    "disjoint dp2 -> tp2": (1, 2, 2, 1, False, True),
    "disjoint dp2 -> tp2, sequence-sharded": (1, 2, 2, 1, True, True),
    "disjoint tp2 -> dp2": (2, 1, 1, 2, False, True),
    "disjoint dp2 -> dp2": (1, 2, 1, 2, False, True),
}


def side(first: int, tp: int, dp: int, rows: int, *, cut: bool = False) -> RowMap:
    """Rows in equal, contiguous shares: over dp with equal copies on tp, or over dp and tp where cut."""
    ranks = [tuple(range(first + d * tp, first + (d + 1) * tp)) for d in range(dp)]
    lanes = [(r,) for group in ranks for r in group] if cut else ranks
    return RowMap.of_items(lanes, [rows // len(lanes)] * len(lanes), list(range(len(lanes))))


def own(case: tuple[int, int, int, int, bool, bool], full: torch.Tensor, comm: BoundaryCommunicator) -> Peer:
    """Our boundary as something to race: a step, whether it is exact, and the bytes it moved."""
    stp, sdp, dtp, ddp, cut, apart = case
    rank, rows = dist.get_rank(), len(full)
    source, dest = side(0, stp, sdp, rows), side(2 if apart else 0, dtp, ddp, rows, cut=cut)
    plan = plan_edge("race", source, dest, rank)
    x, g = full[_held(source, rank)].clone(), -full[_held(dest, rank)]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = comm.forward(plan, x)
        return y, comm.backward(plan, g)

    y, back = step()
    exact = torch.equal(y, -g) and torch.equal(back, -x)
    moved = plan.forward.received_rows + plan.backward[0].received_rows
    return Peer(step, exact, moved * full.shape[1] * full.element_size())


def _held(rows: RowMap, rank: int) -> slice:
    lane = rows.lane_of(rank)
    if lane is None:
        return slice(0, 0)
    run = int((rows.lane == lane).nonzero()[0][0])
    return slice(int(rows.start[run]), int(rows.start[run] + rows.length[run]))


def race(ours: Peer, theirs: Peer | None, iterations: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each iteration, the slowest rank's, the two in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(iterations + 2):
        for which, peer in enumerate((ours, theirs)):
            if peer is None:
                continue
            dist.barrier()
            start = time.perf_counter()
            peer.step()
            dist.barrier()
            if i >= 2:
                times[which].append((time.perf_counter() - start) * 1e3)
    return tuple(_slowest(t) for t in times)  # type: ignore[return-value]


def _slowest(times: list[float]) -> list[float]:
    t = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def run_launch(rows: int, hidden: int, dtype: torch.dtype, iterations: int, out: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    comm = BoundaryCommunicator(dist.group.WORLD)
    full = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, hidden).to(dtype).contiguous()
    results = {}
    make: Callable[..., Peer | None] = megatron_peer() or all_gather_peer
    for name, case in CASES.items():
        ours, theirs = own(case, full, comm), make(case, full)
        exact = torch.tensor([int(ours.exact), ours.bytes])
        dist.all_reduce(exact)
        mine, other = race(ours, theirs, iterations)
        results[name] = {
            "exact": int(exact[0]) == dist.get_world_size(),
            "mib": int(exact[1]) / 2**20,
            "own_ms": min(mine),
            "peer_ms": min(other) if other else None,
            "ratio": min(mine) / min(other) if other else None,
        }
    if dist.get_rank() == 0 and out is not None:
        out.write_text(json.dumps({"peer": make.__name__, "results": results}))
    dist.destroy_process_group()


def drive(launches: int, sizes: list[tuple[int, int, str]], iterations: int, report: Path | None) -> None:
    """Several launches of each size; prints medians of the launches."""
    everything = {}
    for rows, hidden, dtype in sizes:
        runs = []
        for _ in range(launches):
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node=4",
                ]
                command += [__file__, f"--rows={rows}", f"--hidden={hidden}", f"--dtype={dtype}"]
                command += [f"--iters={iterations}", f"--json={file.name}"]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                runs.append(json.loads(Path(file.name).read_text()))
        print(f"\n[{rows}, {hidden}] {dtype}, peer {runs[0]['peer']}, median of {launches} launches")
        table = {}
        for name in CASES:
            found = [r["results"][name] for r in runs]
            ratios = [f["ratio"] for f in found if f["ratio"] is not None]
            ratio = statistics.median(ratios) if ratios else None
            best = min(f["own_ms"] for f in found)
            table[name] = {
                "exact": all(f["exact"] for f in found),
                "mib": found[0]["mib"],
                "own_ms": best,
                "ratio": ratio,
                "ratios": ratios,
            }
            shown = f"{ratio:.2f}x" if ratio is not None else "-"
            print(
                f"{name:46s} {best:8.2f} ms  {found[0]['mib']:7.2f} MiB  {shown:>7s}  exact {table[name]['exact']}"
            )
        everything[f"{rows}x{hidden} {dtype}"] = table
    if report is not None:
        report.write_text(json.dumps(everything, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--launches", type=int, default=3, help="outside torchrun: how many launches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "RANK" in os.environ:
        run_launch(args.rows, args.hidden, getattr(torch, args.dtype), args.iters, args.json)
    else:
        sizes = [(4096, 1024, "float32"), (8192, 2048, "bfloat16")]
        drive(args.launches, sizes, args.iters, args.json)


if __name__ == "__main__":
    main()
