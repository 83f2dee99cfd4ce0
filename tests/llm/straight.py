"""A straight-line language model of attention, dense MLPs and experts with every switch.

Written from the formulas, apart from llm: document by document, whole score matrices, positions as complex
numbers, experts one by one. It takes the parameters of ours by name and gives what ours should.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import LLMConfig

Weights = dict[str, Tensor]


def losses(cfg: LLMConfig, w: Weights, ids: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """Loss of the next token [T], zero where unsupervised, of packed documents."""
    out = []
    for one, label in zip(ids.split(list(lengths)), labels.split(list(lengths)), strict=True):
        x = states(cfg, w, one)
        logits = x @ (w["embed.weight"] if cfg.tied else w["head"]).T * cfg.logit_scale
        logits = bounded(logits, cfg.logit_cap)
        out.append(F.cross_entropy(logits, label, reduction="none", ignore_index=-100))
    return torch.cat(out)


def states(cfg: LLMConfig, w: Weights, ids: Tensor) -> Tensor:
    """Normed last states [n, d] of one document."""
    x = cfg.embed_scale * w["embed.weight"][ids]
    for i, symbol in enumerate(cfg.symbols):
        own = {k.removeprefix(f"layers.{i}."): v for k, v in w.items() if k.startswith(f"layers.{i}.")}
        x = block(cfg, own, symbol, i, x)
    return norm(cfg, x, w["norm.weight"])


def block(cfg: LLMConfig, w: Weights, symbol: str, index: int | None, x: Tensor) -> Tensor:
    """One layer over one document [n, d]."""
    h = norm(cfg, x, w["norm.weight"]) if "norm.weight" in w else x
    m = {k.removeprefix("mixer."): v for k, v in w.items() if k.startswith("mixer.")}
    if symbol == "*":
        h = attention(cfg, m, index, h)
    elif symbol == "-":
        h = mlp(cfg, m, h)
    else:
        h = experts(cfg, m, h)
    if "norm_after.weight" in w:
        h = norm(cfg, h, w["norm_after.weight"])
    return x + cfg.branch_scale * h


def norm(cfg: LLMConfig, x: Tensor, weight: Tensor) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
    return y * (weight + 1 if cfg.norm_shift else weight)


def bounded(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * (x / cap).tanh()


def act(kind: str, x: Tensor) -> Tensor:
    if kind == "relu2":
        return x.clamp(min=0) ** 2
    if kind == "silu":
        return x / (1 + (-x).exp())
    if kind == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    if kind == "clamped":
        g = gate.clamp(max=7)
        return g / (1 + (-1.702 * g).exp()) * (1 + up.clamp(-7, 7))
    return act(kind, gate) * up


def mlp(cfg: LLMConfig, w: Weights, x: Tensor) -> Tensor:
    up = x @ w["up.weight"].T + w.get("up.bias", 0)
    if "gate.weight" in w:
        hidden = gated(cfg.activation, x @ w["gate.weight"].T + w.get("gate.bias", 0), up)
    else:
        hidden = act(cfg.activation, up)
    return hidden @ w["down.weight"].T + w.get("bias", 0)


def experts(cfg: LLMConfig, w: Weights, x: Tensor) -> Tensor:
    assert cfg.router == "softmax" and cfg.norm_top_k and not cfg.latent and cfg.expert_groups == 1
    score = (x @ w["router.weight"].T + w.get("router.bias", 0)).softmax(-1)
    best = (score + w["expert_bias"]).topk(cfg.top_k, -1).indices
    chosen = torch.zeros_like(score).scatter(1, best, 1.0) * score
    weight = cfg.routed_scale * chosen / chosen.sum(-1, keepdim=True)
    shared = {k.removeprefix("shared."): v for k, v in w.items() if k.startswith("shared.")}
    y = mlp(cfg, shared, x) if shared else torch.zeros_like(x)
    for e in range(cfg.n_experts):
        bias = {n: w[f"experts.{n}_bias"][e] if cfg.moe_bias else 0 for n in ("up", "gate", "down")}
        up = x @ w["experts.up"][e].T + bias["up"]
        if cfg.mlp_gated:
            hidden = gated(cfg.activation, x @ w["experts.gate"][e].T + bias["gate"], up)
        else:
            hidden = act(cfg.activation, up)
        y = y + weight[:, e : e + 1] * (hidden @ w["experts.down"][e].T + bias["down"])
    return y


def attention(cfg: LLMConfig, w: Weights, index: int | None, x: Tensor) -> Tensor:
    n, d = len(x), cfg.head_dim
    q, k, v = from_latents(cfg, w, x) if cfg.kv_rank else straight(cfg, w, x)
    windowed = cfg.window is not None and (cfg.window_layers is None or index in cfg.window_layers)
    own = windowed and cfg.window_rope_theta is not None
    theta = cfg.window_rope_theta if own else cfg.rope_theta
    if theta is not None and index not in cfg.rope_skips:
        turns = rotations(cfg, theta, n, scaled=not own)
        # The features with positions first; of keys from latents they are the last.
        back = d - 2 * turns.shape[1] if cfg.kv_rank else 0
        q, k = (turned(y.roll(-back, -1), turns, cfg.rope_interleaved) for y in (q, k))
    scale = 1 / math.sqrt(d) if cfg.attention_scale is None else cfg.attention_scale
    behind = torch.arange(n)[:, None] - torch.arange(n)  # how far each key lies before each query
    reach = cfg.window if windowed and cfg.window is not None else n
    heads = []
    for h in range(cfg.n_heads):
        kv = h * cfg.n_kv_heads // cfg.n_heads
        scores = bounded(scale * q[:, h] @ k[:, kv].T, cfg.attention_cap)
        scores = scores.masked_fill((behind < 0) | (behind >= reach), -math.inf)
        if cfg.attention_sinks:  # a key that nothing is read from
            scores = torch.cat([scores, w["sinks"][h].expand(n, 1)], -1)
        heads.append(scores.softmax(-1)[:, :n] @ v[:, kv])
    return torch.cat(heads, -1) @ w["out.weight"].T + w.get("bias", 0)


def straight(cfg: LLMConfig, w: Weights, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [n, heads, D] before positions."""
    q, k, v = (x @ w[name].T + w.get(f"{name}_bias", 0) for name in "qkv")
    if cfg.qk_norm == "full":
        q, k = norm(cfg, q, w["q_norm"]), norm(cfg, k, w["k_norm"])
    q, k, v = (y.view(len(x), -1, cfg.head_dim) for y in (q, k, v))
    if cfg.qk_norm == "head":
        q, k = norm(cfg, q, w["q_norm"]), norm(cfg, k, w["k_norm"])
    return q, k, v


def from_latents(cfg: LLMConfig, w: Weights, x: Tensor) -> tuple[Tensor, ...]:
    """The same by latents (arXiv 2405.04434, equations 37 to 47), head by head."""
    assert cfg.kv_rank is not None and cfg.rope_head_dim is not None

    def latent(name: str) -> tuple[Tensor, Tensor]:
        y = x @ w[f"{name}_down"].T + w.get(f"{name}_down_bias", 0)
        c, rest = y[:, : len(w[f"{name}_norm"])], y[:, len(w[f"{name}_norm"]) :]
        return c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}_norm"], rest

    c, shared = latent("kv")
    queries = x @ w["q.weight"].T if cfg.q_rank is None else latent("q")[0] @ w["q_up.weight"].T
    plain = cfg.head_dim - cfg.rope_head_dim
    keys, values = [], []
    for up in w["kv_up.weight"].chunk(cfg.n_heads):
        keys.append(torch.cat([c @ up[:plain].T, shared], -1))
        values.append(c @ up[plain:].T)
    return queries.view(len(x), cfg.n_heads, -1), torch.stack(keys, 1), torch.stack(values, 1)


def turned(x: Tensor, turns: Tensor, interleaved: bool = False) -> Tensor:
    """x [n, H, D] with pairs (i, i + m), or (2 i, 2 i + 1), of its first 2 m features times complex numbers
    [n, m]."""
    m = turns.shape[1]
    first = x[..., : 2 * m]
    pairs = first.unflatten(-1, (m, 2)) if interleaved else first.unflatten(-1, (2, m)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * turns[:, None]
    back = torch.view_as_real(product)
    flat = back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2)
    return torch.cat([flat, x[..., 2 * m :]], -1)


def rotations(cfg: LLMConfig, theta: float, n: int, *, scaled: bool) -> Tensor:
    """The complex number by which each pair of features is turned, [n, pairs]."""
    pairs = (cfg.rope_head_dim or int(cfg.head_dim * cfg.rope_share)) // 2
    s = cfg.rope_scaling if scaled else None
    scale, speeds = 1.0, []
    for p in range(pairs):
        speed = theta ** (-p / pairs)
        if s is not None and s.kind == "linear":
            speed /= s.factor
        elif s is not None and s.kind == "llama3":
            assert s.original is not None
            wave = 2 * math.pi / speed
            if wave > s.original / s.low:
                speed /= s.factor
            elif wave >= s.original / s.high:
                smooth = (s.original / wave - s.low) / (s.high - s.low)
                speed = (1 - smooth) * speed / s.factor + smooth * speed
        elif s is not None and s.kind == "longrope":
            assert s.original is not None
            speed /= (s.long if n > s.original else s.short)[p]
            scale = math.sqrt(1 + math.log(s.factor) / math.log(s.original)) if s.factor > 1 else 1.0
        elif s is not None:
            assert s.original is not None
            turns = [s.original / (b * 2 * math.pi) for b in (s.beta_fast, s.beta_slow)]
            ends = [pairs * math.log(t) / math.log(theta) for t in turns]
            low, high = (math.floor(ends[0]), math.ceil(ends[1])) if s.truncate else ends
            low, high = max(low, 0), min(high, 2 * pairs - 1)
            ramp = min(max((p - low) / (high - low if high != low else 1e-3), 0), 1)
            speed = ramp * speed / s.factor + (1 - ramp) * speed
            scale = 0.1 * math.log(s.factor) + 1 if s.factor > 1 else 1.0
        speeds.append(speed)
    if s is not None and s.attention_factor is not None:
        scale = s.attention_factor
    rows = [[scale * cmath.exp(1j * t * v) for v in speeds] for t in range(n)]
    return torch.tensor(rows, dtype=torch.complex128)
