"""Low-rank adapters of a module, as a config asks for them (train.lora)."""

from __future__ import annotations

from torch import nn

from encoders.module import EncoderModule
from mm.config.outline import SINK
from mm.config.schema import Config
from mm.config.training import LoraConfig
from mm.errors import Refused
from parallel.sharding.low_rank import LowRank, add_adapters, linear_maps, matching

FROZEN = ("encoder", "all")  # what model.X.freeze says of an encoder that is not trained


def low_rank(given: LoraConfig) -> LowRank:
    """The adapters that an entry of train.lora asks for."""
    return LowRank(given.rank, given.alpha, given.targets)


def adapt(module: nn.Module, cfg: Config, name: str) -> nn.Module:
    """A stage of module `name` with adapters: of the language model, or of an encoder beside its projector.

    They are frozen where the module is. Targets that are on other stages are passed over.
    """
    given = cfg.train.lora.get(name)
    if given is not None:
        part = _adapted_part(module)
        add_adapters(part, low_rank(given))
        frozen = cfg.llm.get("freeze", False) if name == SINK else cfg.model[name].freeze in FROZEN
        if frozen:
            part.requires_grad_(False)
    return module


def check_adapters(module: nn.Module, cfg: Config, name: str) -> None:
    """Raise Refused where train.lora has a target that no linear map of the whole `module` is."""
    given = cfg.train.lora[name]
    names = [*linear_maps(_adapted_part(module))]
    for target, found in matching(names, given.targets).items():
        if not found:
            known = sorted({n.rpartition(".")[2] for n in names})
            raise Refused(
                f"train.lora.{name}.targets has {target!r}, which is no linear map that can have an adapter "
                "(experts, routers, embeddings and heads cannot); needed: all-linear, or patterns of names "
                f"that end with {', '.join(known) or 'nothing: it has no such map'}"
            )


def _adapted_part(module: nn.Module) -> nn.Module:
    return module.encoder if isinstance(module, EncoderModule) else module
