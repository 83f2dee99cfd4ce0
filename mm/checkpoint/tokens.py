"""Tokens in the place of rows, as exported folders name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mm.containers.container import Token, Whole
from mm.data.published import TOKENIZER, PublishedTokenizer
from mm.data.tokenizer import AnyTokenizer
from mm.data.tokenizer_files import BYTE_MARKERS


@dataclass(frozen=True)
class ItemToken:
    """The token in the place of a module's rows.

    added: whether the tokenizer lacks it: it has the first id that no token has.
    """

    id: int
    text: str
    key: str
    added: bool

    def write(self, folder: Path) -> None:
        """Name it in a folder's tokenizer files, and add it where it is new."""
        file = folder / TOKENIZER
        if self.added:
            core = tokenizers.Tokenizer.from_file(str(file))
            core.add_special_tokens([tokenizers.AddedToken(self.text, special=True, normalized=False)])
            if core.token_to_id(self.text) != self.id:
                raise ValueError(
                    f"{self.text} cannot have the id {self.id}: {file} has ids that follow each other with "
                    "gaps; needed: a tokenizer with this token"
                )
            core.save(str(file))
        note = folder / "tokenizer_config.json"
        said = json.loads(note.read_text())
        if said.get(self.key) != self.text:
            note.write_text(json.dumps({**said, self.key: self.text}, indent=2, ensure_ascii=False) + "\n")


def item_tokens(tokenizer: AnyTokenizer, whole: Whole, tokens: Mapping[str, Token]) -> dict[str, ItemToken]:
    """By module, the token in the place of its rows: the tokenizer's, or one that it is given.

    tokens: by kind of module, the container's.
    Raises ValueError where it has none and the embedding has no row left for one.
    """
    out: dict[str, ItemToken] = {}
    taken: set[int] = set()
    free = tokenizer.needed if isinstance(tokenizer, PublishedTokenizer) else tokenizer.placeholder + 1
    for module, kind in whole.kinds.items():
        token = tokens[kind]
        found = tokenizer.placeholder_of(module)
        if found != tokenizer.pad and found not in taken:
            taken.add(found)
            text = BYTE_MARKERS["image_token"]
            if isinstance(tokenizer, PublishedTokenizer):
                text = str(tokenizer.core.id_to_token(found))
            out[module] = ItemToken(found, text, token.key, added=False)
            continue
        if free >= whole.llm.vocab_size:
            raise ValueError(
                f"the tokenizer has no token for items of model.{module}, and the embedding of "
                f"{whole.llm.vocab_size} tokens no row left for {token.text}; needed: a tokenizer with "
                f"{token.text}, or a larger model.llm.vocab_size"
            )
        out[module] = ItemToken(free, token.text, token.key, added=True)
        free += 1
    return out
