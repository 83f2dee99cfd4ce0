"""The Mamba-2 mixer with Nemotron-H semantics: heads and groups over tp, tokens or heads over cp.

Every projection is a parameter of its own, so that each is sharded evenly; one product computes them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.cache import CachedPacking
from llm.config import LLMConfig
from llm.recompute import run
from llm.scan import ScanInputs, added_states, into_chunks, outputs, scan, state_after
from parallel.comm.collectives import copy_in, reduce_out
from parallel.context_parallel import ContextPacking
from parallel.context_parallel.halo import context_conv, halo_rows
from parallel.context_parallel.state import begin_states, plan_pieces, states_taken
from parallel.context_parallel.ulysses import to_heads, to_tokens
from parallel.sequence.host import to_device
from parallel.sequence.packed import Packing, depthwise_conv
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import Init, ParamSpec, constant, declare, local, normal, uniform
from parallel.tensor_parallel.heads import share_heads
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear, enter, leave
from parallel.topology.axis import Axes


def _log_uniform_a() -> Init:
    """A_log with A uniform in (1, 16)."""
    return Init(lambda u, v: torch.log(1.0 + 15.0 * u))


def _time_step_bias() -> Init:
    """Inverse softplus of a time step that is log-uniform in (1e-3, 1e-1), at least 1e-4."""
    low, high = math.log(1e-3), math.log(1e-1)

    def draw(u: Tensor, v: Tensor) -> Tensor:
        dt = torch.exp(low + (high - low) * u).clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))

    return Init(draw)


class ScanScalars(nn.Module):
    """A_log, D and dt_bias, each [H]; they keep their stored dtype whatever the rest computes in."""

    def __init__(self, heads: int, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        inits = {"a_log": _log_uniform_a(), "d": constant(1.0), "dt_bias": _time_step_bias()}
        for name, init in inits.items():
            declare(self, name, (heads,), ParamSpec(init, shard_dim=0, precise=True), **factory)

    def forward(self, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A (negative), D and dt_bias of the local heads, in dtype acc.

        They are copies: sharding may have freed the gathered weights when the scan's backward reads them.
        """
        return (
            -local(self.a_log).to(acc).exp(),
            local(self.d).to(acc, copy=True),
            local(self.dt_bias).to(acc, copy=True),
        )


ScanMethod = Literal["states", "heads"]
"""How a scan crosses cp: ranks exchange states at the edges of their pieces, or exchange tokens for heads."""


@dataclass(frozen=True)
class MixerShape:
    """Sizes of one tp rank's mixer."""

    heads: int
    head_dim: int
    """Features of a head, P."""
    groups: int
    """Groups that equal runs of heads read."""
    state: int
    """State size, N."""
    kernel: int
    """Taps of the convolution."""

    @property
    def sizes(self) -> list[int]:
        """Channels of x, B and C, the inputs of the convolution."""
        bc = self.groups * self.state
        return [self.heads * self.head_dim, bc, bc]


def mixer_bytes(shape: MixerShape, packing: ContextPacking, itemsize: int) -> dict[ScanMethod, int]:
    """Bytes that the busiest cp rank receives in a forward, by method; the backward receives as many. Pure.

    states: the rows that the convolution reads across an edge, and one state a piece. heads: tokens for heads
    and back; only where the heads, and the groups, split evenly over cp.
    """
    acc = max(itemsize, 4)
    one = shape.heads * (shape.head_dim * shape.state + 1) * acc
    halo = halo_rows(packing, shape.kernel) * sum(shape.sizes) * itemsize
    out: dict[ScanMethod, int] = {"states": states_taken(packing) * one + halo}
    cp = packing.cp.size
    if shape.heads % cp == 0 and (shape.groups % cp == 0 or cp % shape.groups == 0):
        own = shape.heads // cp
        width = own * (shape.head_dim + 1) + 2 * max(shape.groups // cp, 1) * shape.state
        others = packing.whole - packing.whole // cp
        out["heads"] = others * (width * itemsize + own * shape.head_dim * acc)
    return out


def choose_scan_method(shape: MixerShape, packing: ContextPacking, itemsize: int) -> ScanMethod:
    """The method that moves fewer bytes (law 5). Pure: every rank chooses the same."""
    costs = mixer_bytes(shape, packing, itemsize)
    return min(costs, key=lambda method: costs[method])


@dataclass(frozen=True)
class Carry:
    """What the next tokens of a document need from those before. Keeps its graph; see detach()."""

    conv: Tensor
    """Last inputs of the convolution, [K - 1, channels]."""
    state: Tensor
    """State after the last token, [G, N, heads per group, P]."""

    def detach(self) -> Carry:
        """The same values without their graph."""
        return Carry(self.conv.detach(), self.state.detach())


class Mamba(nn.Module):
    """[z, x, B, C, dt] = W x; x, B, C through a causal convolution and SiLU; scan; gated group norm; out.

    Mamba-2: arXiv 2405.21060, section 7. With more tp ranks than groups, each rank computes the groups that
    its own heads read, and the mean square of a group is summed over the ranks that share it.
    """

    adapts = ("in_z", "in_x", "in_b", "in_c", "in_dt")

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.cfg, self.axes = cfg, axes
        tp = axes.tp
        self.shared = share_heads(cfg.mamba_heads, cfg.mamba_groups, tp.size, tp.rank)
        self.heads = cfg.mamba_heads // tp.size
        inner, bc = cfg.mamba_inner, cfg.mamba_groups * cfg.mamba_state
        own_bc = self.shared.count * cfg.mamba_state
        self.sizes = [inner // tp.size, inner // tp.size, own_bc, own_bc, self.heads]

        def spec(name: str, init: Init) -> ParamSpec:
            return self.shared.spec(init) if name in ("b", "c") else ParamSpec(init, shard_dim=0)

        widths = {"z": inner, "x": inner, "b": bc, "c": bc, "dt": cfg.mamba_heads}
        for name, width in widths.items():
            declare(self, f"in_{name}", (width, cfg.d_model), spec(name, normal(cfg.init_std)), **factory)
        bound = 1.0 / math.sqrt(cfg.conv_kernel)  # kaiming uniform with a = sqrt(5)
        for name in ("x", "b", "c"):
            conv = replace(spec(name, uniform(-bound, bound)), matrix=False)
            declare(self, f"conv_{name}", (widths[name], cfg.conv_kernel), conv, **factory)
            declare(self, f"conv_bias_{name}", (widths[name],), conv, **factory)
        declare(self, "norm", (inner,), ParamSpec(constant(1.0), shard_dim=0), **factory)
        self.scalars = ScanScalars(cfg.mamba_heads, **factory)
        self.out = Linear(inner, cfg.d_model, normal(cfg.out_std), shard="row", **factory)
        self.recompute: frozenset[str] = frozenset()

    @property
    def shape(self) -> MixerShape:
        """Sizes of this tp rank's mixer."""
        cfg = self.cfg
        return MixerShape(self.heads, cfg.mamba_head_dim, self.shared.count, cfg.mamba_state, cfg.conv_kernel)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x [T, d], or this rank's share of it under sequence parallelism, to the same."""
        if isinstance(packing, CachedPacking):
            return self._continued(x, packing)
        z, mixed, dt = self._project(x)
        y = run("scan" in self.recompute, self._core, z, mixed, dt, packing)
        return leave(self.out(y), self.axes)

    def resume(self, x: Tensor, carry: Carry | None = None) -> tuple[Tensor, Carry]:
        """(outputs of the next tokens of one document, carry after them); carry: after those before, or None.

        x as in forward. The parts of a document give the same outputs as the whole. Not under cp.
        """
        assert self.axes.cp.size == 1, "under cp the packing joins the parts of a document, not a carry"
        z, mixed, dt = self._project(x)
        packing, width = Packing.of([len(mixed)], mixed.device), self.cfg.conv_kernel - 1
        first = mixed.new_zeros(width, mixed.shape[1]) if carry is None else carry.conv
        slots = torch.arange(width, device=mixed.device)
        kernel, bias = self._taps()
        conv = depthwise_conv(mixed, kernel, bias, packing, causal=True, before=(first, slots))
        inputs = self._scan_inputs(F.silu(conv), dt)
        chunks = into_chunks(inputs, packing.sequence_id, self.cfg.chunk)
        added = added_states(chunks)
        state, fall = state_after(chunks, added)
        before = None
        if carry is not None:
            before = carry.state
            state = state + fall.exp().unsqueeze(1).unsqueeze(-1) * before
        y = self._gated_norm(outputs(chunks, before, added), z)
        after = Carry(torch.cat([first, mixed])[len(mixed) :], state)
        return leave(self.out(y), self.axes), after

    def _continued(self, x: Tensor, packing: CachedPacking) -> Tensor:
        """Outputs [T, d] of the next tokens of documents, whose carries [B, ..] are kept."""
        if packing.begins:
            parts = [self.resume(part) for part in torch.split(x, list(packing.lengths))]
            carries = [carry for _, carry in parts]
            conv, state = (torch.stack([getattr(c, name) for c in carries]) for name in ("conv", "state"))
            packing.cache.layers[self] = Carry(conv, state)
            return torch.cat([y for y, _ in parts])
        carry: Carry = packing.cache.layers[self]
        z, mixed, dt = self._project(x)
        window = torch.cat([carry.conv, mixed.unsqueeze(1)], 1)  # [B, K, channels]
        (kernel, bias), acc = self._taps(), accumulation_dtype(mixed.dtype)
        conv = ((window.to(acc) * kernel.T.to(acc)).sum(1) + bias.to(acc)).to(mixed.dtype)
        new = self._scan_inputs(F.silu(conv), dt)
        values, steps = (
            torch.unflatten(t, 1, (new.b.shape[1], -1)) for t in (new.x, new.dt)
        )  # [B, G, K, ..]
        fall = (steps * new.a.view(new.b.shape[1], -1)).exp()
        added = torch.einsum("bgs,bgkp->bgskp", new.b, values * steps.unsqueeze(-1))
        state = carry.state * fall[:, :, None, :, None] + added
        y = torch.einsum("bgs,bgskp->bgkp", new.c, state).flatten(1, 2)
        assert new.d is not None
        y = y + new.x * new.d.unsqueeze(-1)
        packing.cache.layers[self] = Carry(window[:, 1:], state)
        return leave(self.out(self._gated_norm(y, z)), self.axes)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [T, inner], the convolution's inputs [T, channels] and raw time steps [T, heads]."""
        parts = {n: adapted(self, f"in_{n}") for n in ("z", "x", "b", "c", "dt")}
        y = joined_linear(enter(x, self.axes), self._used(parts))
        z, mixed, dt = torch.split(y, [self.sizes[0], sum(self.sizes[1:4]), self.sizes[4]], dim=-1)
        return z, mixed, dt

    def _used(self, parts: dict[str, Tensor]) -> list[Tensor]:
        """The rows of each weight for this rank's heads, or for the groups that they read."""
        state = self.cfg.mamba_state
        return [self.shared.used(w, state) if n in ("b", "c") else w for n, w in parts.items()]

    def _taps(self) -> tuple[Tensor, Tensor]:
        """Kernel [channels, K] and bias [channels] of the convolution."""
        kernel = {n: local(getattr(self, f"conv_{n}")) for n in ("x", "b", "c")}
        bias = {n: local(getattr(self, f"conv_bias_{n}")) for n in ("x", "b", "c")}
        return torch.cat(self._used(kernel)), torch.cat(self._used(bias))

    def _core(self, z: Tensor, mixed: Tensor, dt: Tensor, packing: Packing) -> Tensor:
        if not isinstance(packing, ContextPacking):
            assert self.axes.cp.size == 1, (
                "under cp a layer needs the packing of parallel.context_parallel.pack()"
            )
            kernel, bias = self._taps()
            conv = F.silu(depthwise_conv(mixed, kernel, bias, packing, causal=True))
            y = scan(self._scan_inputs(conv, dt), packing.sequence_id, self.cfg.chunk)
        elif self._method(packing, mixed.element_size()) == "states":
            y = self._by_states(mixed, dt, packing)
        else:
            y = self._by_heads(mixed, dt, packing)
        return self._gated_norm(y, z)

    def _method(self, packing: ContextPacking, itemsize: int) -> ScanMethod:
        if not self.shared.even:
            return "states"
        key = ("mamba", self.shape, itemsize)
        return packing.once(key, lambda: choose_scan_method(self.shape, packing, itemsize))

    def _scan_inputs(
        self, conv: Tensor, dt: Tensor, own: slice | None = None, groups: int | None = None
    ) -> ScanInputs:
        """Inputs of the scan for this tp rank's heads, or for `own` of them, which read `groups` groups.

        conv [T, channels of x, B and C]: the convolution's outputs; dt [T, heads]: raw time steps.
        """
        cfg = self.cfg
        acc = accumulation_dtype(conv.dtype)
        a, d, dt_bias = (s if own is None else s[own] for s in self.scalars(acc))
        groups = self.shared.count if groups is None else groups
        bc = groups * cfg.mamba_state
        x, b, c = torch.split(conv.to(acc), [len(a) * cfg.mamba_head_dim, bc, bc], dim=-1)
        dt = F.softplus(dt.to(acc) + dt_bias)
        x = torch.unflatten(x, -1, (len(a), cfg.mamba_head_dim))
        b, c = (torch.unflatten(t, -1, (groups, cfg.mamba_state)) for t in (b, c))
        if own is None:
            b, c = self.shared.spread(b), self.shared.spread(c)
        return ScanInputs(x=x, dt=dt, a=a, b=b, c=c, d=d)

    def _by_states(self, mixed: Tensor, dt: Tensor, packing: ContextPacking) -> Tensor:
        """Each rank scans its own pieces and sends a piece's last state to the pieces that continue it."""
        kernel, bias = self._taps()
        inputs = self._scan_inputs(F.silu(context_conv(mixed, kernel, bias, packing)), dt)
        document, size = packing.fragments.sequence_id, self.cfg.chunk
        pieces = packing.once("pieces", lambda: plan_pieces(packing))
        if pieces.fetch is None:
            return scan(inputs, document, size)
        chunks = [into_chunks(inputs.tokens(s), document[s], size) for s in pieces.local]
        added = [added_states(ch) for ch in chunks]
        ends = [state_after(ch, add) for ch, add in zip(chunks, added, strict=True)]
        # By head, as its decays are: [pieces, H, N P].
        state = torch.stack([s.transpose(1, 2).flatten(2).flatten(0, 1) for s, _ in ends])
        begins = begin_states(pieces, state, torch.stack([fall.flatten() for _, fall in ends]))
        out = []
        for ch, add, h in zip(chunks, added, begins, strict=True):
            assert h is not None
            by_group = h.view(*ch.x.shape[2:4], ch.b.shape[-1], -1).transpose(1, 2)
            out.append(outputs(ch, by_group, add))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _by_heads(self, mixed: Tensor, dt: Tensor, packing: ContextPacking) -> Tensor:
        """Each rank scans the whole stream for its share of the heads."""
        cp, shape = packing.cp, self.shape
        columns = packing.once(
            ("columns", shape), lambda: to_device(head_columns(shape, cp.size), mixed.device)
        )
        parts = torch.cat([mixed, dt], -1).index_select(1, columns.flatten())
        own = shape.heads // cp.size
        heads = to_heads(torch.unflatten(parts, 1, columns.shape), packing)
        conv, steps = torch.split(heads, [columns.shape[1] - own, own], dim=-1)
        kernel, bias = (t.index_select(0, columns[cp.rank, :-own]) for t in self._taps())
        whole = packing.once("whole", lambda: Packing(packing.lengths, packing.device))
        conv = F.silu(depthwise_conv(conv, kernel, bias, whole, causal=True))
        mine = slice(cp.rank * own, (cp.rank + 1) * own)
        groups = share_heads(shape.heads, shape.groups, cp.size, cp.rank).count
        y = scan(self._scan_inputs(conv, steps, mine, groups), whole.sequence_id, self.cfg.chunk)
        return to_tokens(y.flatten(1), packing).reshape(-1, shape.heads, shape.head_dim)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """y [T, H, P] of the scan, gated by z [T, H P] and normed by group: [T, H P] in the dtype of z."""
        cfg, acc = self.cfg, y.dtype
        y = y.flatten(1) * F.silu(z.to(acc))
        if self.shared.sharded:
            by_group = torch.unflatten(y, 1, (self.shared.count, -1))
            y = F.rms_norm(by_group, by_group.shape[-1:], None, cfg.norm_eps).flatten(1)
        else:
            # This rank has parts of groups: their sums of squares are summed over tp, in the backward too.
            group = self.shared.first + self.shared.reads(y.device)
            member = (group.unsqueeze(1) == torch.arange(cfg.mamba_groups, device=y.device)).to(acc)  # [H, G]
            by_head = torch.unflatten(y, 1, (self.heads, -1))
            squares = by_head.square().sum(-1) @ member
            squares = copy_in(reduce_out(squares, self.axes.tp), self.axes.tp)
            mean = squares @ member.T * (cfg.mamba_groups / cfg.mamba_inner)
            y = (by_head * (mean + cfg.norm_eps).rsqrt().unsqueeze(-1)).flatten(1)
        return (y * local(self.norm).to(acc)).to(z.dtype)


def head_columns(shape: MixerShape, cp: int) -> Tensor:
    """Columns of [x, B, C, dt] that the heads of each cp rank need, int64 [cp, w]."""
    x, b, c = torch.split(torch.arange(sum(shape.sizes)), shape.sizes)
    dt = torch.arange(shape.heads) + sum(shape.sizes)
    rows = []
    for rank in range(cp):
        part = share_heads(shape.heads, shape.groups, cp, rank)
        groups = slice(part.first * shape.state, (part.first + part.count) * shape.state)
        heads = slice(rank * part.own, (rank + 1) * part.own)
        features = slice(heads.start * shape.head_dim, heads.stop * shape.head_dim)
        rows.append(torch.cat([x[features], b[groups], c[groups], dt[heads]]))
    return torch.stack(rows)
