"""A resampler: learned queries that attend to an item's features, a fixed number of rows whatever these are.

It is Idefics2's (arXiv 2405.02246): features are brought to the language model's width by a gated MLP; then
in each layer the queries attend to the item's features and to themselves. The family's own code rounds norms
to float32 in float64 models too; here they are float64, since rounded gradients depend on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from encoders.activations import ACTIVATIONS, Activation
from encoders.layers import RMSNorm, enter, leave
from encoders.share import Share, pieces, reach
from parallel.comm.fetch import Fetch, make_fetch
from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.host import to_device
from parallel.sequence.intervals import Span
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes, Axis

EPS = 1e-6


class Sizes(NamedTuple):
    """queries: rows of each item. depth: layers. heads: of queries; kv_heads: of keys and values."""

    queries: int = 64
    depth: int = 3
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 96


@dataclass(frozen=True)
class Resampling:
    """What the layers of a batch share.

    given, made: which rows of features, and of queries, this rank has.
    features, queries: bring the keys and values of all items of which this rank has queries.
    order: int64, of what is fetched, features then queries, the keys of one item after another.
    pairing: which keys each query attends to.
    """

    given: Share
    made: Share
    features: Fetch
    queries: Fetch
    order: Tensor
    pairing: Pairing

    @staticmethod
    def of(given: Share, made: Share, axis: Axis, device: torch.device, timeout_s: float) -> Resampling:
        """Make it once a batch, on every rank of `axis`, which is cp. O(items).

        given, made: of the same items. timeout_s: longest wait for another rank's rows, in seconds."""
        first = (0, *accumulate(given.lengths))

        def items(span: Span) -> list[int]:
            return [p.item for p in pieces(made.lengths, span)]

        touched = [items(span) for span in made.spans]
        of_features = [(first[own[0]], first[own[-1] + 1]) if own else (0, 0) for own in touched]
        of_queries = [reach(made.lengths, span) for span in made.spans]

        def fetch(name: str, share: Share, wanted: list[Span]) -> Fetch:
            held, spans = ([[span] for span in side] for side in (share.spans, wanted))
            return make_fetch(name, axis, held, spans, device=device, timeout_s=timeout_s)

        mine = items(made.own)
        own = [p.stop - p.start for p in pieces(made.lengths, made.own)]
        seen, asked = ([share.lengths[i] for i in mine] for share in (given, made))
        return Resampling(
            given,
            made,
            fetch("a resampler's features", given, of_features),
            fetch("a resampler's queries", made, of_queries),
            order=to_device(_interleaved(seen, asked), device),
            pairing=Pairing.of(own, [a + b for a, b in zip(seen, asked, strict=True)], device),
        )


def _interleaved(first: list[int], second: list[int]) -> np.ndarray:
    """Of rows of `first` and then of `second`, so many of each item, those of one item after another."""
    item = np.concatenate([np.repeat(np.arange(len(n)), n) for n in (first, second)])
    return np.argsort(item, kind="stable")


class CrossAttention(nn.Module):
    """Queries to features and queries of their items; heads are sharded over tp."""

    def __init__(self, width: int, sizes: Sizes, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.axes, self.head_dim = axes, sizes.head_dim
        wide, narrow = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.q = Linear(width, wide, normal(width**-0.5), shard="column", **factory)
        self.k = Linear(width, narrow, normal(width**-0.5), shard="column", **factory)
        self.v = Linear(width, narrow, normal(width**-0.5), shard="column", **factory)
        self.out = Linear(wide, width, normal(wide**-0.5 / (2 * sizes.depth) ** 0.5), shard="row", **factory)

    def forward(self, queries: Tensor, features: Tensor, ways: Resampling) -> Tensor:
        """queries [made.kept, width] and features [given.kept, width], both normed, to [made.kept, width]."""
        h, context = enter(queries, self.axes, ways.made), enter(features, self.axes, ways.given)
        both = torch.cat([ways.features(self._keys(context)), ways.queries(self._keys(h))])
        k, v = both.index_select(0, ways.order).unbind(1)
        q = torch.unflatten(self.q(h), -1, (-1, self.head_dim))
        y = attend(q, k, v, ways.pairing).flatten(1)
        return leave(self.out(y), self.axes, ways.made)

    def _keys(self, x: Tensor) -> Tensor:
        """Keys and values [n, 2, heads, head_dim]."""
        kv = torch.stack([self.k(x), self.v(x)], 1)
        return torch.unflatten(kv, -1, (-1, self.head_dim))


class GatedMLP(nn.Module):
    """[kept, d_in] to [kept, d_out] by a gated hidden width, which is sharded over tp."""

    def __init__(
        self, widths: tuple[int, int, int], act: Activation, axes: Axes, **factory: Unpack[FactoryKwargs]
    ) -> None:
        """widths: (d_in, hidden, d_out)."""
        super().__init__()
        d_in, hidden, d_out = widths
        self.axes, self.act = axes, ACTIVATIONS[act]
        self.gate = Linear(d_in, hidden, normal(d_in**-0.5), shard="column", **factory)
        self.up = Linear(d_in, hidden, normal(d_in**-0.5), shard="column", **factory)
        self.down = Linear(hidden, d_out, normal(hidden**-0.5), shard="row", **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        h = enter(x, self.axes, share)
        return leave(self.down(self.act(self.gate(h)) * self.up(h)), self.axes, share)


class ResamplerLayer(nn.Module):
    """Cross-attention and an MLP, each x + f(norm(x))."""

    def __init__(
        self, width: int, sizes: Sizes, act: Activation, axes: Axes, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        device, dtype = factory.get("device"), factory.get("dtype")
        self.query_norm, self.feature_norm, self.norm = (
            RMSNorm(width, eps=EPS, device=device, dtype=dtype) for _ in range(3)
        )
        self.attention = CrossAttention(width, sizes, axes, **factory)
        self.mlp = GatedMLP((width, 4 * width, width), act, axes, **factory)

    def forward(self, x: Tensor, features: Tensor, ways: Resampling) -> Tensor:
        """x: queries [made.kept, width]. features: [given.kept, width]."""
        x = x + self.attention(self.query_norm(x), self.feature_norm(features), ways)
        y: Tensor = x + self.mlp(self.norm(x), ways.made)
        return y


class Resampler(nn.Module):
    """[given.kept, d_in], the features of this rank, to [made.kept, d_out], its queries' rows."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        sizes: Sizes,
        act: Activation,
        axes: Axes,
        **factory: Unpack[FactoryKwargs],
    ) -> None:
        """widths: (d_in, hidden, d_out)."""
        super().__init__()
        width = widths[2]
        self.sizes = sizes
        self.project = GatedMLP(widths, act, axes, **factory)
        declare(self, "queries", (sizes.queries, width), ParamSpec(normal(1.0), matrix=False), **factory)
        self.layers = nn.ModuleList(
            ResamplerLayer(width, sizes, act, axes, **factory) for _ in range(sizes.depth)
        )
        device, dtype = factory.get("device"), factory.get("dtype")
        self.norm = RMSNorm(width, eps=EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor, ways: Resampling) -> Tensor:
        """A collective over cp and tp."""
        features = self.project(x, ways.given)
        queries = local(self.queries)
        own = torch.arange(*ways.made.part, device=x.device) % self.sizes.queries
        y = queries.index_select(0, own)
        for layer in self.layers:
            y = layer(y, features, ways)
        z: Tensor = self.norm(y)
        return z
