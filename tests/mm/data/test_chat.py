"""Conversations: the text, ids and learned tokens that transformers has, where it has no fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from mm.data.conversation import parse_conversation
from mm.data.encode import encode_samples, learned, parse_sample
from mm.data.published import PublishedTokenizer, read_tokenizer
from mm.data.tokenizer import Tokenizer
from tests.llm import oracle  # noqa: F401  # makes transformers importable
from tests.mm.data.tokenizers_made import CHATML, KINDS, UNTAGGED, byte_bpe, unigram, write_tokenizer

from transformers import AutoTokenizer  # isort: skip

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is seen?  naïve 東京"},
    {"role": "assistant", "content": "A boat, and the dog 🙂."},
    {"role": "user", "content": "And now?\n"},
    {"role": "assistant", "content": "The fox jumps"},
]
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
THINKING = (  # as Qwen 3's: reasoning stays in the last turn only
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
)


def flat(segments: Any) -> tuple[list[int], list[int]]:
    """(ids, mask) of segments without items."""
    assert not isinstance(segments, str), segments
    ids = [n for s in segments for n in s.ids]
    return ids, [int(s.loss) for s in segments for _ in s.ids]


def encoded(tokenizer: PublishedTokenizer, messages: Any, **more: Any) -> Any:
    return encode_samples([parse_conversation({"messages": messages, **more})], tokenizer)[0]


def words_learned(tokenizer: PublishedTokenizer, segments: Any) -> list[str]:
    """The text of each run of learned tokens."""
    return [tokenizer.core.decode(s.ids, skip_special_tokens=False) for s in segments if s.ids and s.loss]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_mask_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", KINDS[kind](), template=CHATML)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = flat(encoded(read_tokenizer(folder), CHAT))
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])
    assert 0 < sum(mask) < len(mask)


def test_random_conversations(tmp_path: Path) -> None:
    """Against transformers, but where a turn begins with a blank: its mask drops those of trimmed offsets."""
    folder = write_tokenizer(tmp_path / "t", byte_bpe(), template=CHATML)
    ours, other = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = st.text(max_size=12)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(text, text), min_size=1, max_size=4))
    def check(turns: list[tuple[str, str]]) -> None:
        chat = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        theirs = other.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        assert flat(encoded(ours, chat)) == (theirs["input_ids"], theirs["assistant_masks"])

    check()


def test_a_template_without_the_tag_learns_contents_and_ends_of_turns(tmp_path: Path) -> None:
    """As many tokens as with the tag, whose span here is the same."""
    tagged = read_tokenizer(write_tokenizer(tmp_path / "a", byte_bpe(), template=CHATML))
    plain = read_tokenizer(write_tokenizer(tmp_path / "b", byte_bpe(), template=UNTAGGED))
    assert flat(encoded(tagged, CHAT)) == flat(encoded(plain, CHAT))
    chat = [CHAT[1], {"role": "assistant", "content": " \n padded "}]  # blanks before it are not learned
    assert words_learned(plain, encoded(plain, chat)) == ["padded <|im_end|>"]


def test_reasoning_that_a_template_leaves_out_is_followed(tmp_path: Path) -> None:
    ours = read_tokenizer(write_tokenizer(tmp_path / "t", byte_bpe(), template=THINKING))
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfirst"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nlast"},
    ]
    found = words_learned(ours, encoded(ours, chat))
    assert found == ["first<|im_end|>", "<think>\nhm\n</think>\n\nlast<|im_end|>"]


def test_a_turn_that_begins_with_a_blank_is_learned_whole(tmp_path: Path) -> None:
    """Also where the tokenizer trims blanks from offsets: its first token then begins before its turn."""
    made = byte_bpe()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    ours = read_tokenizer(write_tokenizer(tmp_path / "t", made, template=CHATML))
    chat = [CHAT[1], {"role": "assistant", "content": " the dog"}]
    assert words_learned(ours, encoded(ours, chat))[0].strip() == "the dog<|im_end|>"


def test_items_take_the_place_of_their_placeholders(tmp_path: Path) -> None:
    """In templates that write parts and in those that write strings, with the ids of the text around."""
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Which? "},
        {"type": "image", "image": "b.png", "module": "second"},
    ]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    for template in (PARTS, UNTAGGED):
        for made in (byte_bpe(), unigram()):
            ours = read_tokenizer(write_tokenizer(tmp_path / "t", made, template=template))
            segments = encoded(ours, chat, depends="vision")
            items = [(s.kind, s.name) for s in segments if s.ids is None]
            assert items == [("vision", "a.png"), ("second", "b.png")]
            whole = [n for s in segments for n in (s.ids if s.ids is not None else [ours.find("<image>")])]
            text = (
                "<|im_start|>user\n<image>Which? <image><|im_end|>\n<|im_start|>assistant\nThis.<|im_end|>\n"
            )
            assert whole == ours.encode(text)
            assert [s.depends for s in segments if s.ids and s.loss] == ["vision"]
    video = [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}, chat[1]]
    assert [s.kind for s in encoded(ours, video) if s.ids is None] == [
        "vision"
    ]  # <video> is in no vocabulary


def test_overlap_is_that_of_every_pair() -> None:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=20),
        st.sets(st.integers(0, 30), max_size=8),
    )
    def check(tokens: list[tuple[int, int]], edges: set[int]) -> None:
        offsets = [(a, a + n) for a, n in sorted(tokens)]
        order = sorted(edges)
        spans = list(zip(order[::2], order[1::2], strict=False))
        expected = [any(a < stop and start < b for start, stop in spans) for a, b in offsets]
        assert learned(offsets, spans).tolist() == [e for e in expected]

    check()
    assert learned([(0, 3), (3, 3)], []).tolist() == [False, False]


def test_the_first_token_is_not_learned(tmp_path: Path) -> None:
    """There is nothing before it that could predict it."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ours = read_tokenizer(write_tokenizer(tmp_path / "t", byte_bpe(), template=template))
    segments = encoded(ours, [{"role": "assistant", "content": "ab cd ef"}])
    assert [s.loss for s in segments] == [False, True] and len(segments[0].ids) == 1


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([CHAT[1]], "a chat without an assistant turn"),
        ("hello", "its messages are 'hello'; needed: a list"),
        ([{"role": "user"}], "message 0 has content None; needed"),
        ([{"content": "x"}], "message 0 has role None"),
        ([{"role": "user", "content": [{"type": "smell", "smell": "x"}]}], "needed: a type of text, image"),
        ([{"role": "user", "content": [{"type": "image"}]}], "under its name a string"),
    ],
)
def test_what_is_no_conversation_is_refused_in_words(messages: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_sample(json.dumps({"messages": messages}).encode())


def test_what_cannot_be_rendered_is_refused_in_words(tmp_path: Path) -> None:
    def why(template: str | None, chat: Any = CHAT) -> str:
        ours = read_tokenizer(write_tokenizer(tmp_path / "t", byte_bpe(), template=template))
        found = encoded(ours, chat)
        assert isinstance(found, str)
        return found

    assert "has no chat template; needed: chat_template.jinja" in why(None)
    (tmp_path / "t" / "chat_template.jinja").unlink(missing_ok=True)
    assert "refuses it: no system" in why("{{ raise_exception('no system') }}")
    assert "refuses it: access to attribute" in why("{{ messages.__class__.__mro__ }}")
    assert "changes what the assistant says" in why(
        UNTAGGED.replace("message['content']", "(message['content'] | reverse)")
    )
    assert "0 of its 2 turns" in why("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert "writes nothing as the assistant's" in why(CHATML.replace("== 'assistant'", "== 'bot'"))
    image = [
        {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "<image>"}]}
    ]
    assert "writes 2 placeholders for 1 items" in why(UNTAGGED, [*image, CHAT[2]])
    assert "U+FDD0" in why(CHATML, [{"role": "assistant", "content": "\ufdd1"}])
    assert "no chat template" in encode_samples([parse_conversation({"messages": CHAT})], Tokenizer())[0]


def test_the_names_that_templates_use(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages -%}\n    {%- if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {% if m.role == 'assistant' %}\n{% generation %}{{ m.content | trim }}{{ eos_token }}"
        "{% endgeneration %}\n"
        "  {% else %}{{ bos_token }}{{ tools | tojson }}{{ {'é': '<'} | tojson(indent=1) }}{% endif %}\n"
        "{%- endfor %}{{ strftime_now('%Y') | length }}"
    )
    folder = write_tokenizer(tmp_path / "t", byte_bpe(), template=template)
    chat, tools = CHAT[1:3], [{"type": "function", "function": {"name": "f"}}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = flat(encoded(read_tokenizer(folder), chat, tools=tools))
    assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])
    assert np.sum(mask) > 0
