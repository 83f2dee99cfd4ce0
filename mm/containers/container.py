"""What a container is: a folder of transformers with a language model, encoders and what joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from encoders.contract import Encoder
from encoders.hf.folder import kind_of
from encoders.hf.saying import Rest
from encoders.hf.write import Written
from encoders.projector import ProjectorKind
from llm.config import LLMConfig
from parallel.published import SafeFolder

Pairs = Sequence[tuple[str, str]]
"""Keys of a projector's tensors there, and its parameters here."""


@dataclass(frozen=True)
class Tower:
    """An encoder's module: its encoder, its projector and the projector's hidden width.

    encoder: the name of its class in a config.
    """

    encoder: str
    cls: type[Encoder]
    cfg: Any
    projector: ProjectorKind
    hidden: int

    @property
    def projector_config(self) -> dict[str, Any]:
        """Its projector as a config names it."""
        said = {**asdict(self.projector), "hidden": self.hidden}
        sizes = said.pop("sizes")
        return {**said, **(sizes._asdict() if self.projector.kind == "resampler" else {})}


@dataclass(frozen=True)
class Whole:
    """A whole model, without its weights."""

    llm: LLMConfig
    towers: Mapping[str, Tower]
    """By module."""

    @property
    def kinds(self) -> dict[str, str]:
        """By module, what its encoder takes: vision or audio; "" for one of no published family."""
        return {module: kind_of(tower.cls) for module, tower in self.towers.items()}


@dataclass(frozen=True)
class Place:
    """Where a module's tensors lie in a container: below `tower`, and the projector's by their keys."""

    tower: str
    projector: Pairs = ()


@dataclass(frozen=True)
class Token:
    """The token in the place of a module's rows.

    text: as the container's processor writes it, where the tokenizer names none. field: of config.json, for
    its id. key: of tokenizer_config.json and the processor, for its text.
    """

    text: str
    field: str
    key: str


@dataclass(frozen=True)
class Container:
    """A kind of container.

    name: model_type in config.json. architecture: the class of transformers. hint: what fits it.
    unfit: by option of the config, what it is and what would fit; empty where the container can hold a model.
    language: the key of a tensor of the language model saved alone, in the container.
    places: by kind of module (Whole.kinds), where its tensors lie.
    tokens: by kind of module, its token.
    config: config.json, from that of the language model and the towers as their families write them, but for
        the ids of tokens.
    processor: processor_config.json, by the same and the texts of tokens.
    modules: the encoder modules of a folder, as a config names them, but for the folder of the weights.
        Raises ValueError for what ours cannot be.
    options: of the language model, that its own config.json does not say.
    rest: what the class of a tower has beside ours in this container, from what it has alone.
    named: further ids of config.json, by field the text of their token; left out where there is none.
    """

    name: str
    title: str
    architecture: str
    hint: str
    unfit: Callable[[Whole], list[str]]
    language: Callable[[str], str]
    places: Mapping[str, Place]
    tokens: Mapping[str, Token]
    config: Callable[[Whole, Mapping[str, Any], Mapping[str, Written]], dict[str, Any]]
    processor: Callable[[Whole, Mapping[str, Written], Mapping[str, str]], dict[str, Any]]
    modules: Callable[[SafeFolder], dict[str, dict[str, Any]]]
    options: Callable[[SafeFolder], dict[str, Any]] = lambda folder: {}
    rest: Callable[[Tower, Rest], Rest] = lambda tower, rest: rest
    named: Mapping[str, str] = field(default_factory=dict)
