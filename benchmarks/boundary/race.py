"""Races the boundary against megatron-core's communicators, or an all-gather where that is not importable.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.boundary.race    # one launch, one size
    python -m benchmarks.boundary.race --launches 3                         # medians of launches, two sizes

A race interleaves the parties, each between two barriers, in one process group, and compares minima: a
shared machine drifts, a minimum less so. `cpu` compares processor time of all ranks together. With --launches
freed memory is kept between steps, as the launcher of a job does it.

`replicated`: every tp rank of the destination gets all rows of its dp rank, as the peer does it. `sharded`:
each tp rank gets its part of the sequence, which the peer cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.boundary import peer
from benchmarks.boundary.peer import Layout, Step
from mm.ranks.launch import ALLOCATOR
from parallel.boundary import BoundaryCommunicator, RowMap, plan_edge

WORLD = 4
SIZES = [(4096, 1024, "float32"), (8192, 2048, "bfloat16")]
CASES: dict[str, tuple[Layout, Layout]] = {
    "disjoint dp2 -> tp2": (Layout(1, 2, 0), Layout(2, 1, 2)),
    "disjoint tp2 -> dp2": (Layout(2, 1, 0), Layout(1, 2, 2)),
    "disjoint dp2 -> dp2": (Layout(1, 2, 0), Layout(1, 2, 2)),
    "colocated dp4 -> tp2 dp2": (Layout(1, 4, 0), Layout(2, 2, 0)),
    "colocated dp4 -> tp4": (Layout(1, 4, 0), Layout(4, 1, 0)),
    "colocated tp2 dp2 -> dp4": (Layout(2, 2, 0), Layout(1, 4, 0)),
    "colocated tp4 -> dp4": (Layout(4, 1, 0), Layout(1, 4, 0)),
    "colocated tp2 dp2 -> tp2 dp2": (Layout(2, 2, 0), Layout(2, 2, 0)),
}


def side(layout: Layout, rows: int, sharded: bool = False) -> RowMap:
    """`rows` rows dealt evenly to the dp ranks, and within them to the tp ranks where sharded."""
    ranks = layout.ranks
    lanes = [tuple(ranks[d * layout.tp : (d + 1) * layout.tp]) for d in range(layout.dp)]
    if sharded:
        lanes = [(r,) for ranks in lanes for r in ranks]
    return RowMap.of_items(lanes, [rows // len(lanes)] * len(lanes), range(len(lanes)))


def held(m: RowMap, rank: int) -> slice:
    lane = m.lane_of(rank)
    return slice(0, 0) if lane is None else slice(int(m.start[lane]), int(m.start[lane] + m.length[lane]))


@contextlib.contextmanager
def counted(total: list[int]) -> Iterator[None]:
    """Adds up the payload that this rank hands to torch.distributed, in bytes."""
    saved = {
        n: getattr(dist, n)
        for n in ("batch_isend_irecv", "send", "broadcast", "all_gather_into_tensor", "all_to_all_single")
    }

    def size(t: torch.Tensor) -> int:
        return t.numel() * t.element_size()

    def batch(ops: list[Any]) -> Any:
        total[0] += sum(size(o.tensor) for o in ops if o.op is dist.isend)
        return saved["batch_isend_irecv"](ops)

    def send(t: torch.Tensor, *a: Any, **k: Any) -> Any:
        total[0] += size(t)
        return saved["send"](t, *a, **k)

    def broadcast(t: torch.Tensor, src: Any = None, group: Any = None, **k: Any) -> Any:
        total[0] += size(t) * (dist.get_world_size(group) - 1) if dist.get_rank() == src else 0
        return saved["broadcast"](t, src=src, group=group, **k)

    def gather(out: torch.Tensor, t: torch.Tensor, group: Any = None, **k: Any) -> Any:
        total[0] += size(t) * (dist.get_world_size(group) - 1)
        return saved["all_gather_into_tensor"](out, t, group=group, **k)

    def exchange(out: torch.Tensor, t: torch.Tensor, *a: Any, **k: Any) -> Any:
        total[0] += size(t)
        return saved["all_to_all_single"](out, t, *a, **k)

    for name, wrapped in zip(saved, (batch, send, broadcast, gather, exchange), strict=True):
        setattr(dist, name, wrapped)
    try:
        yield
    finally:
        for name, original in saved.items():
            setattr(dist, name, original)


def own(communicator: BoundaryCommunicator, source: RowMap, dest: RowMap, full: torch.Tensor) -> Step:
    """Forward and backward of our communicator, with autograd as in a training loop."""
    rank = dist.get_rank()
    plan = plan_edge("race", source, dest, rank)
    x = full[held(source, rank)].clone().requires_grad_()
    grad = -full[held(dest, rank)]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = communicator.exchange(plan, x)
        (back,) = torch.autograd.grad(y, x, grad)
        return y, back

    return step


def race(steps: dict[str, Step], iters: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(ms of each party's iterations, interleaved, the slowest rank's; processor ms of all ranks together for
    an iteration, which other work on the machine changes little)."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    names = list(steps)
    for i in range(iters + 2):
        for name in names if i % 2 else names[::-1]:
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            steps[name]()
            dist.barrier()
            if i >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
                spent[name] += (time.process_time() - busy) * 1e3 / iters
    for name, ms in times.items():
        slowest = torch.tensor(ms, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times[name] = slowest.tolist()
        cost = torch.tensor(spent[name], dtype=torch.float64)
        dist.all_reduce(cost)
        spent[name] = cost.item()
    return times, spent


def verify(name: str, step: Step, source: slice, dest: slice, full: torch.Tensor) -> int:
    """Check a party's rows and gradients; its bytes, summed over ranks."""
    total = [0]
    with counted(total):
        y, back = step()
    assert torch.equal(y.detach(), full[dest]), f"{name}: wrong rows"
    assert torch.equal(back, -full[source]), f"{name}: wrong gradients"
    sent = torch.tensor(total)
    dist.all_reduce(sent)
    return int(sent)


def run_case(name: str, args: argparse.Namespace, communicator: BoundaryCommunicator) -> dict[str, Any]:
    source_layout, dest_layout = CASES[name]
    dtype = getattr(torch, args.dtype)
    full = torch.randn(args.rows, args.hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    source, dest = side(source_layout, args.rows), side(dest_layout, args.rows)
    rank = dist.get_rank()
    mine, theirs = held(source, rank), held(dest, rank)
    x, grad = full[mine].clone(), -full[theirs]
    if peer.version() is None:
        ranks = range(WORLD)
        other = peer.all_gather(x, grad, [held(source, r) for r in ranks], [held(dest, r) for r in ranks])
    else:
        make = peer.megatron_disjoint if name.startswith("disjoint") else peer.megatron_colocated
        other = make(source_layout, dest_layout, x, grad)
    steps = {"peer": other, "replicated": own(communicator, source, dest, full)}
    spans = {"peer": theirs, "replicated": theirs}
    if dest_layout.tp > 1:
        split = side(dest_layout, args.rows, sharded=True)
        steps["sharded"], spans["sharded"] = own(communicator, source, split, full), held(split, rank)
    sent = {
        party: verify(f"{name}, {party}", step, mine, spans[party], full) for party, step in steps.items()
    }
    times, spent = race(steps, args.iters)
    best = min(times["peer"])
    return {
        party: {
            "min_ms": min(ms),
            "median_ms": statistics.median(ms),
            "ratio": min(ms) / best,
            "cpu_ms": spent[party],
            "cpu_ratio": spent[party] / spent["peer"],
            "bytes": sent[party],
        }
        for party, ms in times.items()
    }


def launch(args: argparse.Namespace) -> None:
    """One rank of a race."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    if dist.get_world_size() != WORLD:
        raise SystemExit(f"run with --nproc-per-node {WORLD}, not {dist.get_world_size()}")
    everyone = dist.group.WORLD
    assert everyone is not None
    communicator = BoundaryCommunicator(everyone, transport=args.transport)
    wanted = [name for name in CASES if args.only in name]
    results = {name: run_case(name, args, communicator) for name in wanted}
    if dist.get_rank() == 0:
        print(f"against {against()}; boundary [{args.rows}, {args.hidden}] {args.dtype}, {args.transport}")
        for name, parties in results.items():
            print(line(name, parties), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def against() -> str:
    version = peer.version()
    return f"megatron-core {version}" if version else "all-gather (megatron-core is not importable)"


def line(name: str, parties: dict[str, dict[str, float]]) -> str:
    def cell(party: str) -> str:
        p = parties.get(party)
        return (
            f"{'-':>36}"
            if p is None
            else f"{p['min_ms']:8.1f} {p['bytes'] / 2**20:5.0f} MiB {p['ratio']:5.2f} x"
            f"  cpu {p['cpu_ratio']:5.2f}"
        )

    return f"{name:30}" + "".join(f" | {cell(party)}" for party in ("peer", "replicated", "sharded"))


def drive(args: argparse.Namespace) -> None:
    """Several launches of each size; medians of each launch's ratio of minima."""
    report = {}
    for rows, hidden, dtype in SIZES:
        runs = []
        for _ in range(args.launches):
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc-per-node", str(WORLD), "-m", "benchmarks.boundary.race"]
                command += ["--rows", str(rows), "--hidden", str(hidden), "--dtype", dtype]
                command += ["--iters", str(args.iters), "--json", file.name, "--only", args.only]
                command += ["--transport", args.transport]
                environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                runs.append(json.loads(Path(file.name).read_text()))
        print(f"\nagainst {against()}; boundary [{rows}, {hidden}] {dtype}; {args.launches} launches")
        print(
            f"{'':30} | {'peer: ms, bytes':>36} | {'replicated: ms, bytes, ratio, cpu':>36} | {'sharded':>36}"
        )
        report[f"{rows}x{hidden} {dtype}"] = {name: middle([run[name] for run in runs]) for name in runs[0]}
        for name, parties in report[f"{rows}x{hidden} {dtype}"].items():
            ratios = ", ".join(f"{run[name]['replicated']['ratio']:.2f}" for run in runs)
            print(f"{line(name, parties)}   (launches: {ratios})", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def middle(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        party: {key: statistics.median(run[party][key] for run in runs) for key in values}
        for party, values in runs[0].items()
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the whole boundary tensor")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--iters", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases with this in their name")
    parser.add_argument("--transport", default="auto", choices=("auto", "p2p", "all_to_all"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--launches", type=int, help="launch this many races of each size, report medians")
    args = parser.parse_args()
    action: Callable[[argparse.Namespace], None] = drive if args.launches else launch
    action(args)


if __name__ == "__main__":
    main()
