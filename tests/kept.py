"""What autograd keeps from a forward to its backward, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.sharding.param import local


def kept_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the distinct storages that a forward keeps, the model's weights aside; its backward follows.
    What sharding frees after the forward has none."""
    kept: list[Any] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out.requires_grad
    weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
    found = {s.data_ptr(): s.nbytes() for s in kept if s.nbytes() and s.data_ptr() not in weights}
    out.sum().backward()
    return sum(found.values())


def beside_activations(forward: Callable[[int], Tensor], model: nn.Module, unit: int = 1) -> tuple[int, int]:
    """(bytes kept that do not grow with the length of what goes in, bytes for each of its `unit` parts).
    forward: runs the model over one, two or three units."""
    one, two, three = (kept_bytes(lambda n=n: forward(n), model) for n in (1, 2, 3))  # type: ignore[misc]
    assert abs((three - two) - (two - one)) <= 0.01 * three  # so that the rest is what does not grow
    return one - (two - one), (two - one) // unit
