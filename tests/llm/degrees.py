"""One layer of any kind under any degrees over gloo ranks, and its gradients put together again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.layer import Layer, run_layer
from llm.moe import ForwardContext, MoE
from parallel.context_parallel import ContextPacking, pack
from parallel.sequence.packed import Packing
from parallel.sequence.stream import Order, piece_count
from parallel.sharding.param import ParamSpec, declared, initialise
from parallel.topology.axis import Axes, Axis
from parallel.topology.layout import Layout
from tests.llm.harness import axis, shard_by_hand


@dataclass(frozen=True)
class Degrees:
    """A layout of one module on ranks 0 to world - 1, or on these in the order of `ranks`."""

    world: int
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    order: Order = "contiguous"
    ranks: tuple[int, ...] | None = None

    @property
    def layout(self) -> Layout:
        ranks = self.ranks or tuple(range(self.world))
        return Layout(
            "llm",
            ranks,
            tp=self.tp,
            cp=self.cp,
            ep=self.ep,
            etp=self.etp,
            sequence_parallel=self.sp,
        )

    @property
    def step(self) -> int:
        """What the length of a stream must be a multiple of."""
        return math.lcm(piece_count(self.cp, self.order), self.cp * self.tp)


def make_axes(degrees: Degrees) -> Axes:
    made = {
        name: axis(name, [list(g) for g in degrees.layout.groups(name)]) for name in ("tp", "cp", "ep", "etp")
    }
    return Axes(made["tp"], made["ep"], degrees.sp and degrees.tp > 1, made["cp"], made["etp"])


def sharded_dims(spec: ParamSpec, axes: Axes) -> list[tuple[int, Axis]]:
    """The sharded dims of a parameter, each with its axis."""
    if spec.view == "dense":
        pairs = [(spec.shard_dim, axes.tp)]
    else:
        pairs = [(spec.shard_dim, axes.ep), (spec.etp_dim, axes.etp)]
    return [(dim, over) for dim, over in pairs if dim is not None and over.size > 1]


def build(cfg: LLMConfig, symbol: str, axes: Axes, recompute: frozenset[str]) -> Layer:
    layer = Layer(symbol, cfg, axes, device=None, dtype=torch.float64)
    initialise(layer, 3, "layer")
    vary(layer)
    shard_by_hand(layer, axes)
    layer.recompute = recompute
    if hasattr(layer.mixer, "recompute"):
        layer.mixer.recompute = recompute
    if isinstance(layer.mixer, MoE):
        layer.mixer.expert_bias.copy_(0.2 * torch.cos(torch.arange(cfg.n_experts)))
    return layer


@torch.no_grad()
def vary(module: nn.Module) -> None:
    """Change weights of norms and biases, which start as constants, so that none is like another."""
    for _, param, _ in declared(module):
        if not param.count_nonzero() or param.ndim == 1:
            param.add_(0.3 * torch.cos(torch.arange(param.numel(), dtype=param.dtype)).view(param.shape))


def stream(lengths: tuple[int, ...], step: int, width: int) -> tuple[list[int], Tensor, Tensor]:
    """Lengths of documents and padding, hidden states [T, width] and output weights [T, width]."""
    padded = [*lengths, -sum(lengths) % step]
    gen = torch.Generator().manual_seed(sum(lengths))
    x, weight = torch.randn(2, sum(padded), width, generator=gen, dtype=torch.float64)
    return padded, x, weight


def run(
    cfg: LLMConfig,
    symbol: str,
    degrees: Degrees,
    streams: list[tuple[int, ...]],
    recompute: frozenset[str],
    axes: Axes,
    ignores_cp: bool = False,
) -> dict[str, Any]:
    """Forward and backward of this rank's share of its stream: outputs, and gradients of input and weights.

    ignores_cp: the layer has no cp axis and takes its rows for a whole stream.
    """
    coord = degrees.layout.coord(dist.get_rank())
    layer = build(cfg, symbol, replace(axes, cp=Axis.single("cp")) if ignores_cp else axes, recompute)
    given = stream(streams[coord.dp], degrees.step, cfg.d_model)
    found = _forward_backward(layer, given, axes, degrees, ignores_cp)
    return found | {
        "dp": coord.dp,
        "grads": {name: p.grad for name, p, _ in declared(layer)},
        "at": shard_ranks({name: spec for name, _, spec in declared(layer)}, axes),
    }


def _forward_backward(
    layer: Layer, given: tuple[list[int], Tensor, Tensor], axes: Axes, degrees: Degrees, ignores_cp: bool
) -> dict[str, Any]:
    padded, x, weight = given
    n_real = sum(padded[:-1])  # the last is padding
    packing = pack(padded, "cpu", axes.cp, degrees.order)
    rows = torch.from_numpy(packing.rows) if isinstance(packing, ContextPacking) else torch.arange(len(x))
    n_real = packing.rows_before(n_real) if isinstance(packing, ContextPacking) else n_real
    if axes.sequence_parallel:
        rows = rows.chunk(axes.tp.size)[axes.tp.rank]
    mine = x[rows].requires_grad_()
    if ignores_cp and isinstance(packing, ContextPacking):
        packing = packing.fragments
    y = run_layer(layer, mine, ForwardContext(packing, n_real))
    # Without sequence parallelism every tp rank has the same loss, which counts once.
    (y * weight[rows]).sum().backward()
    missing = [n for n, p, _ in declared(layer) if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {"rows": rows, "y": y.detach(), "dx": mine.grad}


def whole(cfg: LLMConfig, symbol: str, streams: list[tuple[int, ...]], step: int) -> dict[str, Any]:
    """The same in one process, stream after stream."""
    layer = build(cfg, symbol, Axes(), frozenset())
    outs = []
    for lengths in streams:
        padded, x, weight = stream(lengths, step, cfg.d_model)
        x.requires_grad_()
        y = run_layer(layer, x, ForwardContext(Packing.of(padded), sum(lengths)))
        (y * weight).sum().backward()
        outs.append({"y": y.detach(), "dx": x.grad})
    return {"streams": outs, "grads": {name: p.grad for name, p, _ in declared(layer)}}


def check(
    cfg: LLMConfig,
    symbol: str,
    degrees: Degrees,
    streams: list[tuple[int, ...]],
    results: list[dict[str, Any]],
) -> None:
    """Compare all ranks with one process: outputs, gradients of inputs and of every weight, to 1e-9."""
    ref = whole(cfg, symbol, streams, degrees.step)
    for result in results:
        expected = ref["streams"][result["dp"]]
        for key in ("y", "dx"):
            close(result[key], expected[key][result["rows"]], f"{symbol} {key} {degrees}")
    layer, axes = shape_only(cfg, symbol, degrees)
    check_gradients(layer, axes, results, ref["grads"], f"{symbol} {degrees}")


def check_gradients(
    module: nn.Module, axes: Axes, results: list[dict[str, Any]], expected: dict[str, Tensor], what: str
) -> None:
    """Compare the gradients of all ranks, put together, with those of one process.

    module: as rank 0 declares it. Results have "grads", and in "at" the shard_ranks() of each.
    """
    for name, _, spec in declared(module):
        by_ranks: dict[tuple[int, ...], Tensor] = {}
        for result in results:
            at, grad = result["at"][name], result["grads"][name]
            by_ranks[at] = by_ranks[at] + grad if at in by_ranks else grad
        for replica in {at[-1] for at in by_ranks}:
            shards = {at[:-1]: g for at, g in by_ranks.items() if at[-1] == replica}
            close(put_together(shards, sharded_dims(spec, axes)), expected[name], f"{name} of {what}")


def shard_ranks(specs: dict[str, ParamSpec], axes: Axes) -> dict[str, tuple[int, ...]]:
    """By parameter: this rank's index on each axis that shards it, then its replica over tp."""
    return {
        name: (*(over.rank for _, over in sharded_dims(spec, axes)), _replica(spec, axes))
        for name, spec in specs.items()
    }


def _replica(spec: ParamSpec, axes: Axes) -> int:
    """Index of a dense parameter's replica over tp; 0 where its gradients are summed over tp."""
    return axes.tp.rank if spec.view == "dense" and spec.shard_dim is None and not spec.partial else 0


def shape_axes(degrees: Degrees) -> Axes:
    """The axes of rank 0, without groups: enough to declare parameters."""
    group: Any = object()
    made = {n: Axis(n, getattr(degrees, n), 0, group) for n in ("tp", "cp", "ep", "etp")}
    return Axes(made["tp"], made["ep"], degrees.sp and degrees.tp > 1, made["cp"], made["etp"])


def shape_only(cfg: LLMConfig, symbol: str, degrees: Degrees) -> tuple[Layer, Axes]:
    """The layer as its rank 0 declares it, without groups or values."""
    axes = shape_axes(degrees)
    return Layer(symbol, cfg, axes, device="meta", dtype=torch.float64), axes


def held_fraction(cfg: LLMConfig, symbol: str, degrees: Degrees) -> float:
    """Fraction of the layer's weights that a rank holds."""
    layer, axes = shape_only(cfg, symbol, degrees)
    held = whole = 0.0
    for _, param, spec in declared(layer):
        whole += param.numel()
        held += param.numel() / math.prod(over.size for _, over in sharded_dims(spec, axes))
    return held / whole


def put_together(shards: dict[tuple[int, ...], Tensor], dims: list[tuple[int, Axis]]) -> Tensor:
    if not dims:
        return shards[()]
    (dim, over), *rest = dims
    parts = [
        put_together({at[1:]: g for at, g in shards.items() if at[0] == i}, rest) for i in range(over.size)
    ]
    return torch.cat(parts, dim)


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    off = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    assert off <= 1e-9 * max(scale, 1e-3), f"{what}: off by {off:.2e} of {scale:.2e}"
