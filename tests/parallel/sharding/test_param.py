"""Initial weights are a function of seed, name and global index alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from parallel.sharding.param import (
    ParamSpec,
    constant,
    declare,
    declared,
    global_index,
    initial_values,
    initialise,
    normal,
    uniform,
)


def values(shape: tuple[int, ...], name: str = "w", seed: int = 0) -> torch.Tensor:
    index = global_index(shape, [torch.arange(n) for n in shape])
    return initial_values(name, seed, normal(1.0), index)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5)])
def test_a_shard_is_made_alone(shape: tuple[int, ...]) -> None:
    whole = values(shape)
    for dim, size in enumerate(shape):
        held = [torch.arange(n) for n in shape]
        held[dim] = torch.arange(1, size, 2)
        part = initial_values("w", 0, normal(1.0), global_index(shape, held))
        assert torch.equal(part, whole.index_select(dim, held[dim]))


def test_seed_and_name_matter() -> None:
    base = values((64,))
    assert torch.equal(base, values((64,)))
    for other in (values((64,), seed=1), values((64,), name="v")):
        assert not torch.isclose(base, other).any()


def test_distributions() -> None:
    x = values((200, 200)).flatten()
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1.0) < 0.02
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.02
    assert float((x.abs() < 1.0).double().mean()) == pytest.approx(math.erf(0.5**0.5), abs=0.01)
    u = initial_values("u", 0, uniform(-2.0, 3.0), torch.arange(10000))
    assert -2.0 < float(u.min()) < -1.99 and 2.99 < float(u.max()) < 3.0
    assert abs(float(u.mean()) - 0.5) < 0.05


def test_a_prefix_does_not_depend_on_the_length() -> None:
    assert torch.equal(values((10,)), values((1000,))[:10])


def test_declarations() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            declare(self, "w", (4, 3), ParamSpec(normal(0.5), shard_dim=0))
            declare(self, "b", (4,), ParamSpec(constant(2.0), partial=True))

    model = nn.ModuleDict({"a": Leaf(), "b": Leaf()})
    assert [(n, s.shard_dim, s.partial) for n, _, s in declared(model)] == [
        ("a.w", 0, False),
        ("a.b", None, True),
        ("b.w", 0, False),
        ("b.b", None, True),
    ]
    initialise(model, 0, "m")
    expected = initial_values("m.a.w", 0, normal(0.5), torch.arange(12)).view(4, 3)
    assert torch.equal(model["a"].w, expected.float())
    assert not torch.equal(model["a"].w, model["b"].w)
    assert (model["b"].b == 2.0).all()
    model["c"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"c\.weight was not declared"):
        list(declared(model))
