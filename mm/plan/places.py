"""The places of a module that statistics are of: its layers, and what it has beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from llm.layer import Layer
from mm.plan.blueprint import Blueprint, bare_module
from mm.plan.weights import layers_of
from parallel.sharding.param import declared
from parallel.topology.axis import Axes
from parallel.topology.stage import whole


class Place(NamedTuple):
    """kind: class of the layer, of its mixer in the language model; "" for what is no layer. trained: whether
    it has a parameter that is trained."""

    kind: str
    trained: bool


@dataclass(frozen=True)
class Places:
    """Of one whole module.

    places: by name, in the order of the parameters. A layer's name is its path; a parameter beside the layers
        is of the place that its path begins with (embed, encoder, projector).
    of: by parameter, the name of its place.
    """

    places: Mapping[str, Place]
    of: Mapping[str, str]


def places(blueprint: Blueprint, module: str) -> Places:
    """The places of a whole module, on whichever stages they are. It is made on the meta device."""
    made = bare_module(blueprint, module, Axes(), whole(blueprint.stages[module][-1].stop))
    kinds = {path: kind_of(layer) for path, layer in layer_paths(made).items()}
    found, of = dict[str, Place](), dict[str, str]()
    for name, param, _ in declared(made):
        parts = name.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        of[name] = place = next((head for head in heads if head in kinds), parts[0])
        trained = param.requires_grad or (place in found and found[place].trained)
        found[place] = Place(kinds.get(place, ""), trained)
    return Places(found, of)


def layer_paths(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of a module, or of a stage of it, by path: it is the same in both."""
    paths = {id(sub): path for path, sub in module.named_modules()}
    return {paths[id(layer)]: layer for layer in layers_of(module)}


def kind_of(layer: nn.Module) -> str:
    """See Place."""
    return type(layer.mixer if isinstance(layer, Layer) else layer).__name__
