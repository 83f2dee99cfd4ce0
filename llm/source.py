"""What a published config.json says beside what the model computes. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and what other programs read of it; nothing here acts on it but an export."""

    family: str
    """The family of published models; the model is written as the same where that can say it. [model_type]"""
    context: int | None = None
    """Tokens of the longest document that it was made for. [max_position_embeddings]"""
    bos: int | None = None
    """Id of the token that begins a document. [bos_token_id]"""
    eos: tuple[int, ...] = ()
    """Ids of tokens that end one. [eos_token_id]"""
    pad: int | None = None
    """Id of the token that fills batches. [pad_token_id]"""
