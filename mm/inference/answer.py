"""Answers of a whole model, as they come."""

from __future__ import annotations

from collections.abc import Iterator

from llm.decode import GREEDY, Prompt, Sampling
from mm.data.encode import turn_end
from mm.data.published import PublishedTokenizer
from mm.data.tokenizer import AnyTokenizer
from mm.inference.asked import Asked


def answer(
    model: Asked, prompt: Prompt, limit: int, sampling: Sampling = GREEDY, *, chat: bool = False
) -> Iterator[int]:
    """The ids that follow a prompt, at most `limit`; the one that ends the answer is the last.

    chat: the end of a turn ends it too.
    """
    stops = set(model.stops)
    if chat and isinstance(model.tokenizer, PublishedTokenizer):
        end = turn_end(model.tokenizer)
        stops |= set() if end is None else {end}
    for (token,) in model.decode([prompt], limit, sampling, stops):
        if token is not None:
            yield token


class TextStream:
    """The text of ids that come one by one: what each adds, once its characters are whole."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._begin = self._shown = 0  # of ids: where the last pieces begin, and what of them has been given

    def add(self, token: int) -> str:
        """The text that a token adds; "" inside a character. O(1) tokens are decoded at a time."""
        self.ids.append(token)
        return self._take(final=False)

    def rest(self) -> str:
        """What is left, incomplete characters replaced."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        # With the piece before, because a decoder may drop the blank that a text begins with.
        before = self.tokenizer.decode(self.ids[self._begin : self._shown])
        text = self.tokenizer.decode(self.ids[self._begin :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._begin, self._shown = self._shown, len(self.ids)
        return text[len(before) :]
