"""Text to token ids: each byte a token, or the tokenizer of a published model (mm/data/published.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mm.data.published import TOKENIZER, PublishedTokenizer, read_tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """Tokens 0-255 are the bytes of UTF-8; markers follow. A text has as many tokens as bytes."""

    bos: int = 256
    eos: int = 257
    pad: int = 258
    placeholder: int = 259  # where an encoder's row enters
    vocab_size: int = 264  # padded to a multiple of 8, so that tp degrees divide it

    @property
    def needed(self) -> int:
        """Rows of the embedding that the ids need."""
        return self.vocab_size

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset([self.eos])

    @property
    def begin(self) -> list[int]:
        """What is put before a text."""
        return [self.bos]

    @property
    def key(self) -> str:
        """What lengths in tokens depend on."""
        return "bytes"

    def encode(self, text: str) -> list[int]:
        """The bytes of a text in UTF-8."""
        return list(text.encode())

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the byte tokens; markers are dropped, incomplete characters replaced."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def placeholder_of(self, module: str, meta: Mapping[str, Any] | None = None) -> int:
        """The id in the place of a module's rows, those of a video too."""
        return self.placeholder


AnyTokenizer = Tokenizer | PublishedTokenizer


def make_tokenizer(name: str) -> AnyTokenizer:
    """The tokenizer that data.tokenizer names: "bytes", or a folder or file of a published one.

    A folder is read once until it changes. Raises ValueError for anything else, and for a folder whose
    tokenizer cannot be used (read_tokenizer).
    """
    if name == "bytes":
        return Tokenizer()
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"data.tokenizer is {name!r}, which does not exist; known: bytes, or a folder with {TOKENIZER}, "
            "or such a file"
        )
    folder = path if path.is_dir() else path.parent
    changed = tuple((p.name, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.j*")))
    return _read(os.fspath(path), changed)


@lru_cache(4)
def _read(path: str, changed: tuple[tuple[str, int], ...]) -> PublishedTokenizer:
    return read_tokenizer(Path(path))
