"""Cross entropy over a sharded vocabulary is exact at any chunk, and never holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.tensor_parallel.loss import vocab_loss
from parallel.topology.axis import Axis

TOKENS, WIDTH, VOCAB = 23, 6, 20


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head weight, labels with unsupervised tokens, weight of each token's loss."""
    gen = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(TOKENS, WIDTH, generator=gen, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=gen)
    labels[::4] = -100
    tilt = torch.randn(TOKENS, generator=gen, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, tilt


def reference(scale: float = 1.0, cap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, tilt = inputs()
    logits = hidden @ weight.T * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return loss.detach(), *torch.autograd.grad((loss * tilt).sum(), (hidden, weight))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (0.3, 2.0)])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_any_chunk_is_cross_entropy(chunk: int, scale: float, cap: float | None) -> None:
    hidden, weight, labels, tilt = inputs()
    loss = vocab_loss(hidden, weight, labels, Axis("tp"), chunk, scale=scale, cap=cap)
    ours = (loss, *torch.autograd.grad((loss * tilt).sum(), (hidden, weight)))
    for a, b in zip(ours, reference(scale, cap), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def sharded_loss(chunk: int, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, this rank's part of the hidden gradient, and the gradient of its vocabulary shard."""
    tp = Axis("tp", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    hidden, weight, labels, tilt = inputs()
    shard = weight.detach().chunk(tp.size)[tp.rank].clone().requires_grad_()
    loss = vocab_loss(hidden, shard, labels, tp, chunk, scale=scale, cap=cap)
    return loss.detach(), *torch.autograd.grad((loss * tilt).sum(), (hidden, shard))


@pytest.mark.parametrize(("world", "scale", "cap"), [(2, 1.0, None), (4, 0.4, 3.0)])
def test_sharded_vocabulary(world: int, scale: float, cap: float | None, ranks: Any) -> None:
    results = ranks(world, sharded_loss, 9, scale, cap)
    loss, d_hidden, d_weight = reference(scale, cap)
    for r in results:
        torch.testing.assert_close(r[0], loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(r[1] for r in results), d_hidden, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), d_weight, rtol=1e-9, atol=1e-12)


def test_narrow_inputs_and_frozen_heads() -> None:
    hidden, weight, labels, tilt = inputs(torch.bfloat16)
    weight.requires_grad_(False)
    loss = vocab_loss(hidden, weight, labels, Axis("tp"), 7)
    assert loss.dtype == torch.float32
    (loss * tilt.float()).sum().backward()
    exact, d_hidden, _ = reference()
    assert (loss - exact).abs().max() < 0.05 * exact.abs().max()
    assert hidden.grad is not None and weight.grad is None
    assert (hidden.grad - d_hidden).abs().max() < 0.05 * d_hidden.abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, vocab, chunk = 256, 512, 16
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    with Largest() as seen:
        vocab_loss(hidden, weight, labels, Axis("tp"), chunk).sum().backward()
    assert seen.elements == chunk * vocab
