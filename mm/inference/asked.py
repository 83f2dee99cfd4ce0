"""What prompts and answers need of a model, in one process or over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from encoders.contract import ItemBatch
from llm.config import LLMConfig
from llm.decode import Prompt, Sampling
from mm.data.tokenizer import AnyTokenizer
from mm.plan.inputs import EncoderUse


class Asked(Protocol):
    """A model that can be asked; over ranks, every rank asks it the same."""

    @property
    def cfg(self) -> LLMConfig:
        """Of the language model."""

    @property
    def uses(self) -> Mapping[str, EncoderUse]:
        """By module of an encoder, how its items are prepared."""

    @property
    def tokenizer(self) -> AnyTokenizer:
        """Of texts."""

    @property
    def begin(self) -> tuple[int, ...]:
        """Ids before a text that no chat template writes."""

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""

    @property
    def device(self) -> torch.device:
        """Where prompts are."""

    def encode(self, module: str, batch: ItemBatch) -> Tensor:
        """The rows of items [R, d], or [R, levels, d]."""

    def decode(
        self, prompts: Sequence[Prompt], limit: int, sampling: Sampling, stops: Collection[int]
    ) -> Iterator[list[int | None]]:
        """As llm.decode.decode()."""
