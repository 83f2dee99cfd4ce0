"""Text to token ids. Each byte is a token: nothing is trained or downloaded, and any text can be encoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokenizer:
    """Tokens 0-255 are the bytes of UTF-8; markers follow. A text has as many tokens as bytes."""

    bos: int = 256
    eos: int = 257
    pad: int = 258
    placeholder: int = 259  # where an encoder's row enters
    vocab_size: int = 264  # padded to a multiple of 8, so that tp degrees divide it

    def encode(self, text: str) -> list[int]:
        """The bytes of a text in UTF-8."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Text of the byte tokens; markers are dropped, incomplete characters replaced."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name`, of which "bytes" is the only one; raises ValueError for any other name."""
    if name != "bytes":
        raise ValueError(f"data.tokenizer is {name!r}; known: bytes")
    return Tokenizer()
