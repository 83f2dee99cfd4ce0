"""What each way of saving memory costs: bytes kept for the backward and seconds, by kind of layer.

    python -m benchmarks.language_model.memory           # a CPU; --device cuda where there is one
    python -m benchmarks.language_model.memory --tokens 8192 --width 1024

One layer of each kind in the proportions of Nemotron 3 Nano, forward and backward, float32. Bytes are those
of distinct storages that autograd keeps, weights aside; with offload, of those that stay on the device.
Ways are interleaved and medians reported, each beside keeping everything. Seconds on a CPU are those of the
process on its one thread, so that a shared machine disturbs little.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import common
from llm.attention import Attention
from llm.layer import Layer, run_layer
from llm.mamba import Mamba
from llm.moe import ForwardContext, MoE
from llm.presets import preset
from parallel.sequence.packed import Packing
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes

WAYS = {
    "M": ("none", "norm", "scan", "full"),
    "*": ("none", "norm", "attention_core", "full"),
    "-": ("none", "norm", "mlp", "full"),
    "E": ("none", "norm", "moe_act", "mlp", "full"),
}
NAMES = {"M": "Mamba-2", "*": "attention", "-": "dense MLP", "E": "experts"}
LEAST_OFFLOADED = 2**20


def build(symbol: str, width: int, device: str) -> Layer:
    cfg = preset(
        "nemotron-3-nano-30b-a3b",
        d_model=width,
        n_heads=width // 64,
        head_dim=64,
        mamba_heads=width // 32,
        mlp_ffn=4 * width,
        n_experts=16,
        expert_ffn=width // 2,
        shared_ffn=width,
    )
    layer = Layer(symbol, cfg, Axes(), device=device, dtype=torch.float32)
    initialise(layer, 0, "layer")
    return layer


def step(layer: Layer, x: Tensor, ctx: ForwardContext) -> float:
    """Seconds of a forward and a backward."""
    start = _now(x)
    run_layer(layer, x, ctx).square().sum().backward()
    return _now(x) - start


def _now(x: Tensor) -> float:
    if x.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(x.device)
    return time.perf_counter()


def kept_bytes(layer: Layer, x: Tensor, ctx: ForwardContext) -> int:
    """Bytes that wait for the backward, apart from weights and from what waits on the host."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}
    # The innermost hooks alone see a tensor, so what goes to the host is left out by its size here.
    least, layer.offload = layer.offload, None

    def pack(t: Tensor) -> Tensor:
        if least is None or t.numel() * t.element_size() < least:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = run_layer(layer, x, ctx)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def use(layer: Layer, way: str, offload: bool) -> None:
    layer.recompute = frozenset({way} - {"none"})
    if isinstance(layer.mixer, Attention | Mamba | MoE):
        layer.mixer.recompute = layer.recompute
    layer.offload = LEAST_OFFLOADED if offload else None


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ctx = ForwardContext(Packing.of([args.tokens], args.device), args.tokens)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(args.tokens, args.width, generator=gen).to(args.device).requires_grad_()
    hidden = x.numel() * x.element_size()
    print(
        f"{args.tokens} tokens, width {args.width}, float32: one hidden state is {hidden / 2**20:.1f} MiB\n"
    )
    print("| layer | recompute | kept, MiB | of all | seconds | of all |\n|---|---|---|---|---|---|")
    for symbol, names in WAYS.items():
        layer = build(symbol, args.width, args.device)
        ways = [(name, False) for name in names] + [("none", True)]
        seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
        bytes_kept = {}
        for turn in range(args.rounds + 1):
            for way in ways:
                use(layer, *way)
                if turn:
                    seconds[way].append(step(layer, x, ctx))
                else:
                    bytes_kept[way] = kept_bytes(layer, x, ctx)
                    use(layer, *way)
                    step(layer, x, ctx)
        for way in ways:
            size, spent = bytes_kept[way], statistics.median(seconds[way])
            whole = bytes_kept[ways[0]], statistics.median(seconds[ways[0]])
            name = "none, large tensors on the host" if way[1] else way[0]
            print(
                f"| {NAMES[symbol]} | {name} | {size / 2**20:.1f} | {size / whole[0]:.2f} | {spent:.3f} | "
                f"{spent / whole[1]:.2f} |"
            )


if __name__ == "__main__":
    main()
