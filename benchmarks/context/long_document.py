"""Forward and backward of layers over one long document, cut over 1, 2 and 4 ranks: time and memory a rank.

    python -m benchmarks.context.long_document    # M and E layers, 1M tokens
    python -m benchmarks.context.long_document --pattern '*' --tokens 131072
    python -m benchmarks.context.long_document --scan    # the scan alone, 1K to 32K tokens

The second is attention, by ring from 4 ranks on.

kept: distinct tensors saved for the backward; peak: growth of the resident set. Both of the rank with most.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks import common
from llm.config import LLMConfig
from llm.layer import Layer, run_layer
from llm.moe import ForwardContext
from llm.scan import ScanInputs, scan
from parallel.context_parallel import pack
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes, Axis

CFG = LLMConfig(
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    mamba_heads=2,
    mamba_head_dim=16,
    mamba_state=16,
    mamba_groups=1,
    n_experts=4,
    top_k=1,
    expert_ffn=16,
    shared_ffn=16,
    mlp_ffn=16,
)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(rank: int, cp: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=cp)
    axis = Axis("cp", cp, rank, dist.group.WORLD) if cp > 1 else Axis.single("cp")
    axes = Axes(cp=axis)
    layers = nn.ModuleList(Layer(s, CFG, axes, device=None, dtype=torch.float32) for s in args.pattern)
    initialise(layers, 0, "layers")
    packing = pack([args.tokens], "cpu", axis, args.order)
    ctx = ForwardContext(packing, packing.total)
    own = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gen = torch.Generator().manual_seed(rank)
    x = torch.randn(packing.total, CFG.d_model, generator=gen).requires_grad_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    dist.barrier()
    start = time.perf_counter()
    y = x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        for layer in layers:
            assert isinstance(layer, Layer)
            y = run_layer(layer, y, ctx)
    middle = time.perf_counter()
    y.square().sum().backward()
    end = time.perf_counter()
    figures = torch.tensor([middle - start, end - middle, sum(saved.values()), resident("VmHWM") - before])
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if rank == 0:
        forward, backward, kept, peak = figures.tolist()
        print(
            f"{args.pattern:6s} {args.tokens:8d} tokens  cp={cp} {args.order:10s} forward {forward:7.1f} s  "
            f"backward {backward:7.1f} s  kept {kept / 2**20:7.1f} MiB  peak {peak / 2**20:7.1f} MiB",
            flush=True,
        )
    dist.destroy_process_group()


def scan_times() -> None:
    torch.set_num_threads(1)
    heads, width, state = 8, 16, 16
    for tokens in (1 << k for k in range(10, 16)):
        gen = torch.Generator().manual_seed(0)
        x, dt = torch.randn(tokens, heads, width, generator=gen), torch.rand(tokens, heads, generator=gen)
        b, c = torch.randn(2, tokens, 2, state, generator=gen)
        inputs: list[Any] = [x, dt * 0.1, -torch.ones(heads), b, c]
        leaves = [t.requires_grad_() for t in inputs]
        document = torch.zeros(tokens, dtype=torch.int64)
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            scan(ScanInputs(*leaves), document, 64).sum().backward()
            best = min(best, time.perf_counter() - start)
        print(
            f"scan {tokens:6d} tokens  {best * 1e3:7.1f} ms  {best / tokens * 1e6:6.2f} us a token",
            flush=True,
        )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--pattern", default="ME")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--order", default="contiguous", choices=["contiguous", "zigzag"])
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--scan", action="store_true")
    args = parser.parse_args()
    if args.scan:
        scan_times()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for cp in args.cp:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(measure, (cp, port, args), nprocs=cp)


if __name__ == "__main__":
    main()
