"""The chunked scan is the recurrence, for any documents, at a cost linear in length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.scan import BLOCK_BYTES, ScanInputs, added_states, into_chunks, outputs, scan, state_after


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, document: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t, one token after another."""
    per_group = x.shape[1] // b.shape[1]
    b, c = (t.repeat_interleave(per_group, 1) for t in (b, c))
    h = x.new_zeros(x.shape[1], x.shape[2], b.shape[2])
    out = []
    for t in range(len(x)):
        if t and document[t] != document[t - 1]:
            h = torch.zeros_like(h)
        h = (dt[t] * a).exp()[:, None, None] * h + (dt[t, :, None] * x[t])[..., None] * b[t, :, None]
        out.append((h * c[t, :, None]).sum(-1))
    return torch.stack(out)


def inputs(lengths: list[int], dtype: torch.dtype = torch.float64, steep: float = 4.0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(sum(lengths))

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    t = sum(lengths)
    dt = torch.rand(t, 6, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    a = (-steep * torch.rand(6, generator=gen, dtype=torch.float64)).to(dtype).requires_grad_()
    return [make(t, 6, 4), dt, a, make(t, 2, 5), make(t, 2, 5)]


def documents(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


@pytest.mark.parametrize("lengths", [[1], [5], [16], [17], [7, 1, 30, 0, 2], [16, 16, 33], [48, 3]])
def test_scan_is_the_recurrence(lengths: list[int]) -> None:
    args, doc = inputs(lengths), documents(lengths)
    weight = torch.randn_like(args[0])
    results = []
    for y in (scan(ScanInputs(*args), doc, 16), recurrence(*args, doc)):
        results.append([y, *torch.autograd.grad((y * weight).sum(), args)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_scan_in_two_parts_is_one_scan() -> None:
    args, skip = inputs([40]), torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    weight, doc = torch.randn_like(args[0]), documents([40])
    leaves = [*args, skip]
    results = []
    for edge in (40, 7, 16):
        parts: list[Tensor] = []
        state: Tensor | None = None
        for at in (slice(0, edge), slice(edge, 40)):
            if at.start == at.stop:
                continue
            chunks = into_chunks(ScanInputs(*args, d=skip).tokens(at), doc[at], 16)
            added = added_states(chunks)
            parts.append(outputs(chunks, state, added))
            state = state_after(chunks, added)[0]
        y = torch.cat(parts)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    whole = recurrence(*args, doc) + args[0] * skip.unsqueeze(-1)
    expected = [whole, *torch.autograd.grad((whole * weight).sum(), leaves)]
    for found in results:
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_blocks_of_chunks_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [19, 40, 3]
    args, doc = inputs(lengths), documents(lengths)
    expected = scan(ScanInputs(*args), doc, 4)
    grads = torch.autograd.grad(expected.square().sum(), args)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", budget)
    y = scan(ScanInputs(*args), doc, 4)
    found = [y, *torch.autograd.grad(y.square().sum(), args)]
    for ours, theirs in zip(found, [expected, *grads], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_steep_decays_in_float32_are_finite_and_close() -> None:
    lengths = [70, 31]
    wide = inputs(lengths, steep=60.0)
    narrow = [t.detach().float().requires_grad_() for t in wide]
    doc = documents(lengths)
    results = []
    for args in (wide, narrow):
        y = scan(ScanInputs(*args), doc, 32)
        results.append([y, *torch.autograd.grad(y.square().sum(), args)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours.double() - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_chunk_does_not_matter() -> None:
    lengths = [19, 40]
    args, doc = inputs(lengths), documents(lengths)
    for chunk in (1, 7, 64):
        torch.testing.assert_close(
            scan(ScanInputs(*args), doc, chunk), scan(ScanInputs(*args), doc, 16), rtol=1e-10, atol=1e-12
        )


def test_no_tokens() -> None:
    args = inputs([3])
    empty = [t[:0] if t.ndim > 1 else t for t in args]
    assert scan(ScanInputs(*empty), documents([]), 16).shape == (0, 6, 4)


def test_cost_is_linear_in_length() -> None:
    costs = []
    for t in (256, 1024):
        with FlopCounterMode(display=False) as counter:
            scan(ScanInputs(*inputs([t])), documents([t]), 32).sum().backward()
        costs.append(counter.get_total_flops())
    assert 3.9 < costs[1] / costs[0] < 4.2
