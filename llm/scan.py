"""The Mamba-2 state space scan over packed documents, in chunks (SSD, arXiv 2405.21060, section 6).

Shapes: T tokens, c chunks of Q tokens, G groups, K heads a group (H = G K), P head dim, N state size.
The state of a document starts at zero; nothing passes from one document to the next. Work and memory are
linear in T: T Q for the part within chunks, one state per chunk for the part across.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, document: Tensor, chunk: int) -> Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, h = 0 before each document.

    x [T, H, P], dt [T, H] (positive), a [H] (negative), b and c [T, G, N], document [T] int64, one value per
    document. Returns [T, H, P] in the dtype of x, which should be float32 or float64.
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
    xd = (x * dt.unsqueeze(-1)).view(n, q, groups, per_group, width).permute(0, 2, 3, 1, 4)  # [c, G, K, Q, P]
    b, c = b.view(n, q, groups, state), c.view(n, q, groups, state)
    total = (dt * a).view(n, q, groups, per_group).permute(0, 2, 3, 1).cumsum(-1)  # [c, G, K, Q]

    # Within a chunk: token i reads every earlier token j of its own document.
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    reads = causal & (doc.unsqueeze(2) == doc.unsqueeze(1))  # [c, i, j]
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = decay.masked_fill(~reads[:, None, None], float("-inf")).exp()  # [c, G, K, i, j]
    score = torch.einsum("cign,cjgn->cgij", c, b).unsqueeze(2)
    y = (score * decay) @ xd  # [c, G, K, i, P]

    if n > 1:
        before = _states_before(xd, b, total, doc)  # [c - 1, G, K, P, N]
        carried = (doc[1:] == doc[:-1, -1:])[:, None, None]  # the chunk before ended in this document
        strength = (total[1:].exp() * carried).unsqueeze(-1)
        late = torch.einsum("cqgn,cgkpn->cgkqp", c[1:], before) * strength
        y = torch.cat([y[:1], y[1:] + late])
    return y.permute(0, 3, 1, 2, 4).reshape(n * q, heads, width)[:tokens]


def _states_before(xd: Tensor, b: Tensor, total: Tensor, doc: Tensor) -> Tensor:
    """State with which each chunk but the first begins, [c - 1, G, K, P, N]."""
    stays = (doc == doc[:, -1:])[:, None, None]  # tokens of the document that a chunk ends in
    strength = (total[..., -1:] - total).exp() * stays
    added = torch.einsum("cgkqp,cqgn->cgkpn", xd * strength.unsqueeze(-1), b)
    whole = F.pad(doc[1:, -1] == doc[:-1, -1], (1, 0))  # no document ended inside the chunk
    keep = total[..., -1].exp() * whole[:, None, None]
    state = added[0]
    out = [state]
    for k in range(1, len(doc) - 1):
        state = state * keep[k, ..., None, None] + added[k]
        out.append(state)
    return torch.stack(out)
