"""Text to token ids. Bytes are tokens: nothing to train, nothing to download, any text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokenizer:
    """Byte tokens 0-255, then markers; padded to a size that divides by common degrees.

    The length of a text in tokens is its length in bytes, which is what the index holds.
    """

    bos: int = 256
    eos: int = 257
    pad: int = 258
    placeholder: int = 259
    vocab_size: int = 264

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Text of the byte tokens; markers are dropped, torn characters replaced."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes"."""
    if name != "bytes":
        raise ValueError(f"data.tokenizer is {name!r}; known: bytes")
    return Tokenizer()
