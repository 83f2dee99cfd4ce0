"""Parts of tables of published tensors: the linear maps and norms of transformer blocks."""

from __future__ import annotations

from collections.abc import Sequence

from encoders.hf.family import Rows
from parallel.published import Row

Pairs = list[tuple[str, tuple[str, ...]]]
"""Keys there and parameters here, of one layer."""


def both(there: str, here: str) -> Pairs:
    """The weight and the bias of a map or a norm that is a module here."""
    return [(f"{there}.{kind}", (f"{here}.{kind}",)) for kind in ("weight", "bias")]


def row_parallel(there: str, here: str) -> Pairs:
    """The weight and the bias of a map whose bias is its parent's, added after the sum over tp."""
    return [(f"{there}.weight", (f"{here}.weight",)), (f"{there}.bias", (f"{here.rpartition('.')[0]}.bias",))]


def separate(names: Sequence[str]) -> Pairs:
    """Queries, keys and values that are linear maps of their own there. names: of the three."""
    out: Pairs = []
    for ours, theirs in zip("qkv", names, strict=True):
        out.append((f"{theirs}.weight", (f"attention.{ours}",)))
        out.append((f"{theirs}.bias", (f"attention.bias_{ours}",)))
    return out


def fused(there: str) -> Pairs:
    """Queries, keys and values that are one linear map there."""
    weights = tuple(f"attention.{n}" for n in "qkv")
    biases = tuple(f"attention.bias_{n}" for n in "qkv")
    return [(f"{there}.weight", weights), (f"{there}.bias", biases)]


def rows(pairs: Pairs, there: str = "", here: str = "") -> Rows:
    """Pairs below a prefix there and here."""
    return [(Row(key, ours), there, here) for key, ours in pairs]


def blocks(pairs: Pairs, layers: int, there: str) -> Rows:
    """The rows of each block. there: what its keys begin with, with the layer's number as {n}."""
    out: Rows = []
    for n in range(layers):
        out += rows(pairs, there.format(n=n), f"blocks.{n}.")
    return out
