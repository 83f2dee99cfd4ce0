"""The two directions of a step."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Directions(NamedTuple, Generic[T]):
    """Something that there is once for activations and once for gradients: each has an order of its own.

    forward: activations, from source to sink and on to later stages; backward: gradients, the other way.
    """

    forward: T
    backward: T
