"""The Mamba-2 state space scan over packed documents, in chunks (SSD, arXiv 2405.21060, section 6).

Shapes: T tokens, n chunks of Q tokens, G groups, K heads a group (H = G K), P head dim, N state size.
The state of a document starts at zero; nothing passes from one document to the next. Work and memory are
linear in T: T Q for the part within chunks, one state per chunk for the part across.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, document: Tensor, chunk: int) -> Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, h = 0 before each document.

    x [T, H, P], dt [T, H] (not negative), a [H] (negative), b and c [T, G, N], document [T] int64, one value
    per document. Returns [T, H, P] in the dtype of x, which should be float32 or float64.
    """
    tokens, heads, width = x.shape
    groups, state = b.shape[1:]
    per_group = heads // groups
    q = max(1, min(chunk, tokens))
    pad = -tokens % q
    n = (tokens + pad) // q
    if pad:
        # Rows with dt = 0 add nothing and, at the very end, decay nothing that is used.
        x, dt, b, c = (F.pad(t, (0, 0) * (t.ndim - 1) + (0, pad)) for t in (x, dt, b, c))
        document = F.pad(document, (0, pad), value=-1)
    doc = document.view(n, q)
    xd = (x * dt.unsqueeze(-1)).view(n, q, groups, per_group, width).permute(0, 2, 3, 1, 4)  # [n, G, K, Q, P]
    b, c = (t.reshape(n, q, groups, state).transpose(1, 2) for t in (b, c))  # [n, G, Q, N]
    total = (dt * a).view(n, q, groups, per_group).permute(0, 2, 3, 1).cumsum(-1)  # [n, G, K, Q]
    y = _WithinChunks.apply(xd, total, b, c, doc)
    if n > 1:
        before = _states_before(xd, b, total, doc)  # [n - 1, G, K, N, P]
        carried = (doc[1:] == doc[:-1, -1:])[:, None, None]  # the chunk before ended in this document
        strength = (flushed_exp(total[1:]) * carried).unsqueeze(-1)
        late = (c[1:].unsqueeze(2) @ before) * strength
        y = torch.cat([y[:1], y[1:] + late])
    return y.permute(0, 3, 1, 2, 4).reshape(n * q, heads, width)[:tokens]


def flushed_exp(x: Tensor) -> Tensor:
    """exp of x <= 0, exactly 0 below the square root of the smallest normal number.

    Such decays are far below rounding, but they and their products would be denormal numbers, which CPUs
    compute with many times slower.
    """
    return F.threshold(x, _floor(x.dtype), -math.inf).exp()


def _floor(dtype: torch.dtype) -> float:
    return 0.5 * math.log(torch.finfo(dtype).tiny)


class _WithinChunks(torch.autograd.Function):
    """y_i = sum over tokens j <= i of i's chunk and document of (C_i . B_j) exp(total_i - total_j) xd_j.

    Written out because autograd would keep several [n, G, K, Q, Q] tensors, by far the largest here: the
    backward makes the decays again and takes the gradient of total from row and column sums.
    """

    @staticmethod
    def forward(ctx: Any, xd: Tensor, total: Tensor, b: Tensor, c: Tensor, doc: Tensor) -> Tensor:
        ctx.save_for_backward(xd, total, b, c, doc)
        return (_decays(total, doc) * (c @ b.mT).unsqueeze(2)) @ xd

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        xd, total, b, c, doc = ctx.saved_tensors
        decay = _decays(total, doc)
        score = (c @ b.mT).unsqueeze(2)  # [n, G, 1, Q, Q]
        d_weight = (grad @ xd.mT).mul_(decay)
        d_score = d_weight.sum(2)  # [n, G, Q, Q]
        flow = d_weight.mul_(score)
        d_total = flow.sum(-1) - flow.sum(-2)
        d_xd = decay.mul_(score).mT @ grad
        return d_xd, d_total, d_score.mT @ c, d_score @ b, None


def _decays(total: Tensor, doc: Tensor) -> Tensor:
    """flushed exp(total_i - total_j) where token i may read token j, else 0: [n, G, K, Q (i), Q (j)]."""
    q = doc.shape[1]
    reads = torch.ones(q, q, dtype=torch.bool, device=doc.device).tril()
    reads = reads & (doc.unsqueeze(2) == doc.unsqueeze(1))  # [n, i, j]
    hide = torch.where(reads, 0.0, -math.inf).to(total.dtype)
    # Base 2 because on CPUs exp() is seven times slower at minus infinity, and adding a mask beats filling.
    total = total * math.log2(math.e)
    fall = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(hide[:, None, None])
    floor = _floor(fall.dtype) * math.log2(math.e)
    return F.threshold(fall, floor, -math.inf, inplace=True).exp2_()


def _states_before(xd: Tensor, b: Tensor, total: Tensor, doc: Tensor) -> Tensor:
    """State with which each chunk but the first begins, [n - 1, G, K, N, P]."""
    doc, total = doc[:-1], total[:-1]
    stays = (doc == doc[:, -1:])[:, None, None]  # tokens of the document that a chunk ends in
    strength = flushed_exp(total[..., -1:] - total) * stays
    added = b[:-1].mT.unsqueeze(2) @ (xd[:-1] * strength.unsqueeze(-1))
    whole = doc[1:, -1] == doc[:-1, -1]  # no document ended inside the chunk
    keep = (flushed_exp(total[1:, ..., -1]) * whole[:, None, None])[..., None, None]
    state = added[0]
    out = [state]
    for k in range(1, len(doc)):
        state = torch.addcmul(added[k], state, keep[k - 1])
        out.append(state)
    return torch.stack(out)
