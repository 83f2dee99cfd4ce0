"""Muon over sharded matrices: each matrix is made whole on one rank, which works out its update.

The update of a matrix needs all of it and costs about 15 of its products with itself, so the ranks that share
matrices deal the work among them. The shards of a matrix go to one of these ranks in at most two hops: over
the data ranks, then over tp (or etp for experts). Parts of the update come back the same way. A hop moves a
shard once in each direction. The experts of a layer are matrices of their own. Where each lies whole on a
rank, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sharding.dtypes import accumulation_dtype
from parallel.sharding.param import ParamSpec
from parallel.sharding.rules import Muon, Shard
from parallel.sharding.shard import data_dim, data_view, sharded_dims
from parallel.topology.layout import View
from parallel.topology.mesh import REPLICA, ModuleMesh

# Of the quintic iteration whose singular values end within 0.7 to 1.2 (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
# The root mean square of AdamW's updates, so that one learning rate serves both (arXiv 2502.16982, 2.2).
ADAM_RMS = 0.2


def is_matrix(spec: ParamSpec, ndim: int) -> bool:
    """Whether Muon updates a parameter: a linear map, or the stacked linear maps of experts."""
    return spec.matrix and ndim == (3 if spec.view == "expert" else 2)


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """Matrices [.., n, m] with the same singular vectors and singular values near 1."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    for _ in range(steps):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    out: Tensor = y.mT if tall else y
    return out


@dataclass(frozen=True)
class _Hop:
    """A way from shards of matrices to whole ones, over one group.

    group, size, rank: of the ranks that each have a part of every matrix.
    dims: by matrix stack, the dim (1 or 2 of [s, n, m]) that the group splits; None: it does not split it.
    extents: by matrix stack, how much of that dim each rank has.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    dims: Sequence[int | None]
    extents: Sequence[Sequence[int]]

    def there(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Parts of stacks [s, n, m], to the whole matrices of each stack that this rank works on."""
        owned = self._owned(blocks)
        sent: list[list[Tensor]] = [[] for _ in range(self.size)]
        for block, dim, own in zip(blocks, self.dims, owned, strict=True):
            for r in range(self.size) if dim is not None else ():
                sent[r].append(block[own[r]].reshape(-1))
        shapes = [
            [self._part(b, d, e, own[self.rank], r) for b, d, e, own in self._split(blocks, owned)]
            for r in range(self.size)
        ]
        parts = self._exchange(sent, shapes, blocks)
        found = iter(zip(*parts, strict=True))
        return [
            block if dim is None else torch.cat(next(found), dim)
            for block, dim in zip(blocks, self.dims, strict=True)
        ]

    def back(self, whole: Sequence[Tensor], blocks: Sequence[Tensor]) -> list[Tensor]:
        """The reverse: what there() gave, of any values, to stacks of the shapes of `blocks`."""
        owned = self._owned(blocks)
        sent: list[list[Tensor]] = [[] for _ in range(self.size)]
        for w, dim, extent in zip(whole, self.dims, self.extents, strict=True):
            if dim is not None:
                for r, part in enumerate(torch.split(w, list(extent), dim)):
                    sent[r].append(part.reshape(-1))
        shapes = [
            [(len(range(b.shape[0])[own[r]]), *b.shape[1:]) for b, _, _, own in self._split(blocks, owned)]
            for r in range(self.size)
        ]
        parts = self._exchange(sent, shapes, blocks)
        out, at = [], 0
        for w, block, dim, own in zip(whole, blocks, self.dims, owned, strict=True):
            if dim is None:
                out.append(w)
                continue
            made = torch.empty_like(block)
            for r in range(self.size):
                made[own[r]] = parts[r][at]
            out.append(made)
            at += 1
        return out

    def _split(
        self, blocks: Sequence[Tensor], owned: Sequence[Sequence[slice]]
    ) -> list[tuple[Tensor, int, Sequence[int], Sequence[slice]]]:
        every = zip(blocks, self.dims, self.extents, owned, strict=True)
        return [(b, d, e, own) for b, d, e, own in every if d is not None]

    def _owned(self, blocks: Sequence[Tensor]) -> list[list[slice]]:
        """By stack and rank, the matrices that the rank works on: dealt in turn, over all stacks."""
        out, dealt = [], 0
        for block, dim in zip(blocks, self.dims, strict=True):
            first = [(r - dealt) % self.size for r in range(self.size)]
            out.append([slice(k, None, self.size) for k in first])
            dealt += 0 if dim is None else block.shape[0]
        return out

    def _part(self, block: Tensor, dim: int, extent: Sequence[int], own: slice, r: int) -> tuple[int, ...]:
        shape = [len(range(block.shape[0])[own]), *block.shape[1:]]
        shape[dim] = extent[r]
        return tuple(shape)

    def _exchange(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """What each rank sent here, in `shapes`, by rank."""
        if not shapes[0]:
            return [[] for _ in range(self.size)]
        flat = torch.cat([x for of_rank in sent for x in of_rank])
        sizes = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
        out = flat.new_empty(sum(map(sum, sizes)))
        counts = [sum(x.numel() for x in of_rank) for of_rank in sent]
        dist.all_to_all_single(out, flat, list(map(sum, sizes)), counts, group=self.group)
        parts = iter(torch.split(out, [n for of_rank in sizes for n in of_rank]))
        return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


class MuonRule:
    """Muon of the matrices of one module on this rank."""

    def __init__(self, shards: Sequence[Shard], mesh: ModuleMesh, hyper: Muon) -> None:
        self.hyper, self.mesh = hyper, mesh
        self.views: dict[View, list[Shard]] = {}  # other ranks share a matrix in each
        for s in shards:
            self.views.setdefault(data_view(s.spec, mesh), []).append(s)
        self.momentum = {s.name: torch.zeros_like(s.local) for s in shards}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for view, every in self.views.items():
            # Gradients are absent where the module was skipped, which all its ranks agree on.
            shards = [s for s in every if s.local.grad is not None]
            if shards:
                self._step(view, shards, lr)

    def _step(self, view: View, shards: Sequence[Shard], lr: float) -> None:
        blocks = []
        for s in shards:
            assert s.local.grad is not None
            momentum = self.momentum[s.name].mul_(self.hyper.momentum).add_(s.local.grad)
            ahead = s.local.grad.add(momentum, alpha=self.hyper.momentum)  # Nesterov's
            blocks.append(ahead.to(accumulation_dtype(ahead.dtype)).view(-1, *ahead.shape[-2:]))
        hops = _hops(view, shards, self.mesh)
        stacks = [blocks]
        for hop in hops:
            stacks.append(hop.there(stacks[-1]))
        whole = self._among_replicas(view, stacks[-1])
        for hop, before in zip(hops[::-1], stacks[-2::-1], strict=True):
            whole = hop.back(whole, before)
        for s, update in zip(shards, whole, strict=True):
            rate = lr * s.rate
            s.local.mul_(1 - rate * self.hyper.rest.weight_decay)
            scale = ADAM_RMS * max(s.param.shape[-2:]) ** 0.5
            s.local.add_(update.view_as(s.local).to(s.local.dtype), alpha=-rate * scale)

    def _among_replicas(self, view: View, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The updates of whole matrices; ranks that hold the same ones share the work."""
        copies = self.mesh.replicas(view)
        if copies == 1:
            return [orthogonalise(x, self.hyper.steps) for x in stacks]
        over = self.mesh.over(view, REPLICA)
        out, dealt = [torch.zeros_like(x) for x in stacks], 0
        for x, y in zip(stacks, out, strict=True):
            mine = slice((over.get_local_rank() - dealt) % copies, None, copies)
            y[mine] = orthogonalise(x[mine], self.hyper.steps)
            dealt += x.shape[0]
        flat = torch.cat([y.reshape(-1) for y in out])
        dist.all_reduce(flat, group=over.get_group())  # all but one add zeros
        parts = torch.split(flat, [y.numel() for y in out])
        return [part.view_as(y) for part, y in zip(parts, out, strict=True)]

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {name: {"momentum": value} for name, value in self.momentum.items()}


def _hops(view: View, shards: Sequence[Shard], mesh: ModuleMesh) -> list[_Hop]:
    """The ways to whole matrices, in order: over the data ranks first, whose parts lie inside those of tp."""
    data = mesh.data if view == "dense" else mesh.over("expert", "edp")
    model = mesh.axes.tp if view == "dense" else mesh.axes.etp
    over_data, over_model = [], []
    for s in shards:
        shape, split = list(s.param.shape), sharded_dims(s.spec, mesh)
        for axis, dim in split.items():
            shape[dim] //= mesh.over(s.spec.view, axis).size()
        dim = data_dim(tuple(shape), split.values(), data.size())
        over_data.append(_parts(shape, dim, data.size()))
        over_model.append(_parts(list(s.param.shape), split.get(model.name), model.size))
    hops = []
    if data.size() > 1:
        hops.append(_hop(data.get_group(), data.size(), data.get_local_rank(), over_data))
    if model.size > 1:
        assert model.group is not None
        hops.append(_hop(model.group, model.size, model.rank, over_model))
    return hops


def _parts(shape: list[int], dim: int | None, size: int) -> tuple[int | None, list[int]]:
    """(dim of [s, n, m], what each rank has of it); None for the dim of stacked experts."""
    first = len(shape) - 2  # of the matrix
    if dim is None or dim < first:
        return None, []
    chunks = torch.arange(shape[dim]).chunk(size)
    return dim - first + 1, [len(chunks[r]) if r < len(chunks) else 0 for r in range(size)]


def _hop(
    group: dist.ProcessGroup, size: int, rank: int, parts: Sequence[tuple[int | None, list[int]]]
) -> _Hop:
    return _Hop(group, size, rank, [dim for dim, _ in parts], [extent for _, extent in parts])
