"""Activation recomputation: parts of a layer that the backward computes again instead of keeping."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PARTS = {
    "full": "whole layers: only their inputs are kept; who goes to which expert is kept, not decided again",
    "mlp": "dense MLPs and shared experts",
    "moe_act": "the activation inside routed experts; of use with a gate, the squared ReLU keeps no input",
    "norm": "norms before layers, whose wide copy of the input is not kept",
    "attention_core": "attention between its projections; with latents their expansion too",
    "scan": "the state space scan with its convolution and gate, between its projections",
}


def recompute_parts(value: bool | str | Collection[str]) -> frozenset[str]:
    """The parts to compute again, given True (full), False or "none" (nothing), a name, or several names.

    Raises ValueError for a name that is not in PARTS.
    """
    if isinstance(value, bool):
        return frozenset({"full"} if value else ())
    names = {value} if isinstance(value, str) else set(value)
    names.discard("none")
    for name in sorted(names - set(PARTS)):
        near = difflib.get_close_matches(name, PARTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: none, {', '.join(PARTS)}"
        raise ValueError(f"recompute has {name!r}; {hint}")
    return frozenset(names)


def run(again: bool, fn: Callable[..., Tensor], *args: Any) -> Tensor:
    """fn(*args); with `again` the backward keeps only the arguments and calls fn once more."""
    # Imported here because recompute_parts() is used where torch is not imported.
    import torch
    from torch.utils.checkpoint import checkpoint

    if not (again and torch.is_grad_enabled()):
        return fn(*args)
    out = checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, torch.Tensor)
    return out
