"""Whether a tokenizer is that of published weights: rows of an embedding mean the tokens of its training."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from mm.data.published import TOKENIZER, PublishedTokenizer
from mm.data.tokenizer import make_tokenizer
from mm.data.tokenizer_files import byte_level


def check_vocabulary(name: str, folder: Path) -> None:
    """Raise ValueError where the tokenizer `name` (data.tokenizer) gives ids that are others in `folder`.

    folder: of published weights; without a tokenizer.json nothing is known. Tokens that ours adds may be.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return
    ours = make_tokenizer(name)
    core = ours.core if isinstance(ours, PublishedTokenizer) else byte_level(ours)
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is no {TOKENIZER} that tokenizers reads: {error}") from error
    here = core.get_vocab()
    wrong = sorted((n, token) for token, n in theirs.items() if here.get(token) != n)
    if wrong:
        n, token = wrong[0]
        found = "absent" if token not in here else f"{here[token]}"
        raise ValueError(
            f"data.tokenizer {name} has another vocabulary than the weights of {folder}: {len(wrong)} of "
            f"{len(theirs)} tokens differ, such as {token!r}, which is {n} there and {found} here; needed: "
            f"data.tokenizer={folder}, or weights of its own model"
        )
