"""Learning rates by parameter: of modules and their parts, and lower ones in lower layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from encoders.module import EncoderModule
from mm.config.outline import SINK
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, bare_module
from parallel.topology.axis import Axes
from parallel.topology.stage import whole


def rates(blueprint: Blueprint, module: str) -> Callable[[str], float]:
    """By a parameter's name in `module`, the factor on train.lr that train.lr_by and train.layer_decay give.

    Raises Refused where a layer decay is asked of an encoder that lists no layers.
    """
    train = blueprint.cfg.train
    decay = train.layer_decay.get(module)
    depths = {} if decay is None else _depths(blueprint, module)

    def rate(name: str) -> float:
        part = "encoder" if name.startswith("encoder.") else "projector"
        lr = train.lr_by.get(module, train.lr)
        if module != SINK:
            lr = train.lr_by.get(f"{module}.{part}", lr)
        return lr / train.lr * (1.0 if decay is None else decay ** depths[name])

    return rate


def _depths(blueprint: Blueprint, module: str) -> dict[str, int]:
    """By parameter, how many layers there are above it: none above the head, all above the embedding.

    An embedding and what an encoder declares before its first layer lie below it, all else above (BEiT, arXiv
    2106.08254, appendix).
    """
    made = bare_module(blueprint, module, Axes(), whole(blueprint.stages[module][-1].stop))
    layers = list(_layers(made))
    if not layers:
        raise Refused(
            f"train.layer_decay has {module}, whose encoder lists no layers; needed: one with `layers`, or "
            f"train.lr_by={{{module}: ..}}"
        )
    paths = {id(sub): path for path, sub in made.named_modules()}
    inside = [f"{paths[id(layer)]}." for layer in layers]
    names = [name for name, _ in made.named_parameters()]
    found = {name: k for name in names for k, path in enumerate(inside) if name.startswith(path)}
    before = range(names.index(next(iter(found)))) if module != SINK else ()
    below = {names[n] for n in before} | {n for n in names if module == SINK and n.startswith("embed.")}
    return {n: len(layers) - found[n] if n in found else (len(layers) + 1) * (n in below) for n in names}


def _layers(made: nn.Module) -> list[nn.Module]:
    if isinstance(made, EncoderModule):
        return list(made.encoder.layers)
    found = made.layers
    assert isinstance(found, nn.ModuleList)
    return list(found)
