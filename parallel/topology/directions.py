"""The two directions of a step."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Directions(NamedTuple, Generic[T]):
    """A pair of things, one for activations and one for gradients.

    forward: of activations, which go from source to sink and on to later stages.
    backward: of gradients, which go the other way.
    """

    forward: T
    backward: T
