"""Collectives are adjoint to their backward; sharded linears and embeddings equal whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.comm import collectives as c
from parallel.sharding.param import initialise, normal
from parallel.tensor_parallel.layers import Linear, VocabEmbedding, enter, leave
from parallel.topology.axis import Axes, Axis
from tests.llm.harness import shard_by_hand

TOKENS, WIDTH, HIDDEN, VOCAB = 8, 6, 12, 20


def world() -> Axis:
    return Axis("tp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def make(seed: int, *shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def inner_products() -> dict[str, tuple[float, float]]:
    """<f(x), y> and <x, f'(y)>, each summed over ranks, for the joint map of all ranks.

    Where ranks hold the same value, it counts once: inputs are replicas for copy_in and split_tokens, outputs
    are for reduce_out and join_tokens.
    """
    axis = world()
    t = TOKENS
    own, shared = 10 + axis.rank, 5
    cases = {
        # name: (function, x, y, input replicated, output replicated)
        "copy_in": (c.copy_in, make(shared, t, 2), make(own, t, 2), True, False),
        "reduce_out": (c.reduce_out, make(own, t, 2), make(shared, t, 2), False, True),
        "gather_tokens": (c.gather_tokens, make(own, t, 2), make(own, t * axis.size, 2), False, False),
        "reduce_tokens": (c.reduce_tokens, make(own, t, 2), make(own, t // axis.size, 2), False, False),
        "split_tokens": (c.split_tokens, make(shared, t, 2), make(own, t // axis.size, 2), True, False),
        "join_tokens": (c.join_tokens, make(own, t, 2), make(shared, t * axis.size, 2), False, True),
    }
    out = {}
    for name, (fn, x, y, same_in, same_out) in cases.items():
        x = x.requires_grad_()
        z = fn(x, axis)
        (grad,) = torch.autograd.grad((z * y).sum(), x)
        forward = (z.detach() * y).sum() / (axis.size if same_out else 1)
        backward = (x.detach() * grad).sum() / (axis.size if same_in else 1)
        both = torch.stack([forward, backward])
        dist.all_reduce(both)
        out[name] = (float(both[0]), float(both[1]))
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_adjoints(size: int, ranks: Any) -> None:
    for result in ranks(size, inner_products):
        for name, (forward, backward) in result.items():
            assert forward == pytest.approx(backward, rel=1e-12), name


def blocks(axes: Axes) -> dict[str, Tensor]:
    """An embedding, then up (with bias) and down; outputs and gradients of this rank."""
    tp = axes.tp
    embed = VocabEmbedding(VOCAB, WIDTH, normal(1.0), tp, dtype=torch.float64)
    up = Linear(WIDTH, HIDDEN, normal(1.0), shard="column", bias=True, dtype=torch.float64)
    down = Linear(HIDDEN, WIDTH, normal(1.0), shard="row", dtype=torch.float64)
    model = torch.nn.ModuleDict({"embed": embed, "up": up, "down": down})
    initialise(model, 0, "block")
    shard_by_hand(model, axes)
    ids = torch.arange(TOKENS) * 7 % VOCAB
    x = leave(embed(ids), axes)
    y = x + leave(down(torch.tanh(up(enter(x, axes)))), axes)
    weight = make(1, TOKENS, WIDTH)
    mine = weight.chunk(axes.token_shards)[tp.rank if axes.sequence_parallel else 0]
    (y * mine).sum().backward()
    return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def sharded_blocks(sequence_parallel: bool) -> dict[str, Tensor]:
    return blocks(Axes(tp=world(), sequence_parallel=sequence_parallel))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_layers_are_whole_layers(size: int, sequence_parallel: bool, ranks: Any) -> None:
    results = ranks(size, sharded_blocks, sequence_parallel)
    whole = blocks(Axes())
    dims = {"embed.weight": 0, "up.weight": 0, "up.bias": 0, "down.weight": 1}
    for name, dim in dims.items():
        joined = torch.cat([r[name] for r in results], dim)
        torch.testing.assert_close(joined, whole[name], rtol=1e-9, atol=1e-12)
    tokens = [torch.cat([r["y"] for r in results])] if sequence_parallel else [r["y"] for r in results]
    for y in tokens:
        torch.testing.assert_close(y, whole["y"], rtol=1e-9, atol=1e-12)


def test_embedding_refuses_an_uneven_vocabulary() -> None:
    fake: Any = object()
    with pytest.raises(ValueError, match="does not divide by tp=3"):
        VocabEmbedding(VOCAB, WIDTH, normal(1.0), Axis("tp", 3, 0, fake))


def test_whole_linear() -> None:
    layer = Linear(4, 3, normal(1.0), bias=True, dtype=torch.float64)
    initialise(layer, 0, "linear")
    x = make(0, 5, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
