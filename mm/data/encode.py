"""Samples as tokens: the one place where text becomes ids, for lengths in an index and for training alike.

A sample of segments: each text is encoded by itself, so its ids do not depend on what stands around it, and
the segments stay as the data has them. A tokenizer that puts a blank before a text puts one before each.

A conversation: the text that the chat template writes is encoded as a whole, because pieces of it would give
other ids. A token is learned where its characters overlap what the assistant has written. Runs of tokens that
are alike in that are its segments, and each placeholder's token gives way to the rows of its item.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm.data.chat import BEGIN, END
from mm.data.conversation import Conversation, parse_conversation
from mm.data.layouts.tar import made_of
from mm.data.published import Encoded, PublishedTokenizer
from mm.data.sample import WrittenSegment, load_json, segments_of
from mm.data.tokenizer import AnyTokenizer

NO_TEMPLATE = (
    "it is a conversation, but data.tokenizer=bytes has no chat template; needed: the folder of a tokenizer "
    "that has one, or turns as plain text (plain: true in data.layout)"
)
Written = Sequence[WrittenSegment] | Conversation


@dataclass(frozen=True)
class TokenSegment:
    """A segment as tokens."""

    kind: str  # "text", or the module of an item
    ids: Sequence[int] | None  # None for an item
    name: str  # of the item's part; "" for text
    loss: bool
    depends: str | None


def parse_sample(
    payload: bytes, layout: str = "segments", part: str = "json", names: Sequence[str] = ()
) -> Written:
    """What the text part of a sample has, segments or a conversation; raises ValueError with what is wrong.

    part: the name of the text part. names: of the sample's items.
    """
    return parse_made(load_json(payload) if layout == "segments" else made_of(payload, part, layout, names))


def parse_made(data: Any) -> Written:
    """The segments or the conversation of an object; raises ValueError with what is wrong with it."""
    if isinstance(data, dict) and "messages" in data:
        if "segments" in data:
            raise ValueError("its json has both messages and segments; needed: one of them")
        return parse_conversation(data)
    return segments_of(data)


def encode_samples(
    samples: Sequence[Written], tokenizer: AnyTokenizer
) -> list[tuple[TokenSegment, ...] | str]:
    """The segments of each sample, or why it cannot be encoded. O(characters), all samples at once."""
    out: list[tuple[TokenSegment, ...] | str] = [""] * len(samples)
    chats = [i for i, s in enumerate(samples) if isinstance(s, Conversation)]
    for i, found in zip(chats, _chats((samples[i] for i in chats), tokenizer), strict=True):
        out[i] = found
    plain = [seg for s in samples if not isinstance(s, Conversation) for seg in s]
    ids = iter(tokenizer.encode_texts([seg.text for seg in plain if seg.text is not None]))
    for i, sample in enumerate(samples):
        if not isinstance(sample, Conversation):
            out[i] = tuple(
                TokenSegment(s.kind, None if s.text is None else next(ids), s.name, s.loss, s.depends)
                for s in sample
            )
    return out


def _chats(samples: Iterable[Written], tokenizer: AnyTokenizer) -> list[tuple[TokenSegment, ...] | str]:
    out: list[tuple[TokenSegment, ...] | str] = []
    ready: list[tuple[int, Conversation, str, list[tuple[int, int]]]] = []
    for i, sample in enumerate(samples):
        assert isinstance(sample, Conversation)
        out.append("")
        try:
            ready.append((i, sample, *render(sample, tokenizer)))
        except ValueError as error:
            out[i] = str(error)
    if ready:
        assert isinstance(tokenizer, PublishedTokenizer)
        encoded = tokenizer.encode_spans([text for _, _, text, _ in ready])
        for (i, sample, _, spans), found in zip(ready, encoded, strict=True):
            try:
                out[i] = _learning(sample, found, spans, tokenizer)
            except ValueError as error:
                out[i] = str(error)
    return out


def render(chat: Conversation, tokenizer: AnyTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the characters that are learned; raises ValueError in words."""
    if not isinstance(tokenizer, PublishedTokenizer):
        raise ValueError(NO_TEMPLATE)
    if any(mark in json.dumps(chat.messages, ensure_ascii=False) for mark in (BEGIN, END)):
        raise ValueError("a message has the noncharacter U+FDD0 or U+FDD1, which mark turns here")
    text, spans = tokenizer.render(chat.messages, chat.tools)
    if not any(stop > start for start, stop in spans):
        raise ValueError(
            "its chat template writes nothing as the assistant's, so there is nothing to learn in it"
        )
    return text, spans


def learned(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """By token, whether its characters overlap one of the spans, which are in order and apart: bool [T].

    Overlap, and not containment: tokens may share a character, and may begin with the blank before a span.
    """
    at = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    start, stop = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(stop, at[:, 0], side="right")  # the first span that ends after the token begins
    found: np.ndarray = np.append(start, np.iinfo(np.int64).max)[first] < at[:, 1]
    return found


def _learning(
    chat: Conversation, found: Encoded, spans: Sequence[tuple[int, int]], tokenizer: PublishedTokenizer
) -> tuple[TokenSegment, ...]:
    """_runs(); raises ValueError where nothing is learned too."""
    out = _runs(chat, found, spans, tokenizer)
    if not any(seg.loss for seg in out if seg.ids is not None):
        raise ValueError("none of its tokens is learned")
    return out


def _runs(
    chat: Conversation, found: Encoded, spans: Sequence[tuple[int, int]], tokenizer: PublishedTokenizer
) -> tuple[TokenSegment, ...]:
    """Segments of an encoded conversation: runs of tokens with and without loss, and items."""
    ids = np.asarray(found.ids, dtype=np.int64)
    loss = learned(found.offsets, spans)
    loss[:1] = False  # nothing comes before the first token that could predict it
    places = _places(chat, ids, tokenizer)
    edges = {0, len(ids), *(np.flatnonzero(np.diff(loss)) + 1).tolist()}
    edges |= {n for p in places.tolist() for n in (p, p + 1)}
    bounds, items = sorted(edges), dict(zip(places.tolist(), chat.items, strict=True))
    out = []
    for a, b in itertools.pairwise(bounds):
        if a in items:
            out.append(TokenSegment(items[a].module, None, items[a].name, True, None))
        else:
            learns = bool(loss[a])
            out.append(TokenSegment("text", found.ids[a:b], "", learns, chat.depends if learns else None))
    return tuple(out)


def _places(chat: Conversation, ids: np.ndarray, tokenizer: PublishedTokenizer) -> np.ndarray:
    """Indices of the tokens that give way to the conversation's items, in order."""
    kinds = {tokenizer.find(tokenizer.placeholders[i.kind]): i.kind for i in chat.items}
    places = np.flatnonzero(np.isin(ids, list(kinds)))
    there = [kinds[n] for n in ids[places].tolist()]
    if there != [item.kind for item in chat.items]:
        wanted = ", ".join(tokenizer.placeholders[i.kind] for i in chat.items)
        raise ValueError(
            f"its chat template writes {len(there)} placeholders for {len(chat.items)} items; needed: "
            f"{wanted} in this order, and none of them in its texts"
        )
    return places


def encode_prompt(chat: Conversation, tokenizer: PublishedTokenizer) -> tuple[TokenSegment, ...]:
    """A conversation that an answer follows: up to what begins a turn of the assistant. Raises ValueError."""
    text, _ = tokenizer.render(chat.messages, chat.tools, prompt=True)
    return _runs(chat, tokenizer.encode_spans([text])[0], [], tokenizer)


def turn_end(tokenizer: PublishedTokenizer) -> int | None:
    """The token that ends a turn of the assistant, by the chat template; None where it is no special one."""
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    found = encode_samples([Conversation(turns, (), None, None)], tokenizer)[0]
    if isinstance(found, str):
        return None
    last = [seg.ids for seg in found if seg.ids and seg.loss][-1][-1]
    token = tokenizer.core.get_added_tokens_decoder().get(last)
    return last if token is not None and token.special else None
