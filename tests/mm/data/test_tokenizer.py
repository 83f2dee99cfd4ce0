"""Published tokenizers: ids as transformers gives them, special tokens, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data import tokenizer_files
from mm.data.published import PublishedTokenizer, read_tokenizer
from mm.data.tokenizer import Tokenizer, make_tokenizer
from mm.data.tokenizer_files import KEPT, keep_tokenizer
from tests.llm import oracle  # noqa: F401  # makes transformers importable
from tests.mm.data.tokenizers_made import KINDS, TEXTS, byte_bpe, unigram, write_tokenizer

from transformers import AutoTokenizer  # isort: skip


def theirs(folder: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Truncation, padding and markers that the file stores do not act."""
    folder = write_tokenizer(tmp_path / "t", KINDS[kind]())
    ours, other = make_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    expected = [other(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ours.encode_texts(TEXTS) == expected
    assert [ours.encode(text) for text in TEXTS] == expected
    assert [ours.decode(ids) for ids in expected] == [
        other.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in expected
    ]
    assert (ours.bos, ours.eos, ours.pad) == (other.bos_token_id, other.eos_token_id, other.pad_token_id)
    assert ours.needed == len(other) and ours.vocab_size % 128 == 0 <= ours.vocab_size - ours.needed < 128


def test_ids_of_random_texts_are_those_of_transformers(tmp_path: Path) -> None:
    pairs = []
    for i, kind in enumerate(KINDS):
        folder = write_tokenizer(tmp_path / str(i), KINDS[kind]())
        pairs.append((make_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)))

    @settings(max_examples=25, deadline=None)
    @given(
        st.text(max_size=30),
        st.sampled_from(["", "<image>", "</s>", " <|im_end|> ", "  "]),
        st.text(max_size=9),
    )
    def check(a: str, b: str, c: str) -> None:
        for ours, other in pairs:
            assert ours.encode(a + b + c) == other(a + b + c, add_special_tokens=False)["input_ids"]

    check()


def test_special_tokens_are_found_wherever_a_folder_names_them(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", byte_bpe(), bos_token=None, pad_token=None)
    got = read(folder)
    assert got.bos == got.eos == got.pad == 1  # documents without a begin marker follow an end marker
    (folder / "config.json").write_text(
        json.dumps({"bos_token_id": 3, "pad_token_id": 2, "image_token_id": 4})
    )
    got = read(folder)
    assert (got.bos, got.pad, got.placeholders["image"]) == (3, 2, "<|im_end|>")
    write_tokenizer(folder, byte_bpe(), eos_token={"content": "<|im_end|>"}, image_token="<image>")
    got = read(folder)
    assert got.eos == 4 and got.placeholder_of("vision") == got.placeholder_of("image") == 5
    assert got.placeholder_of("audio") == 6  # <audio> is in the vocabulary
    alone = (tmp_path / "alone").with_suffix(".json")
    alone.write_bytes((folder / "tokenizer.json").read_bytes())
    got = read(alone)
    assert (got.bos, got.eos) == (0, 1) and got.chat is None


def read(path: Path) -> PublishedTokenizer:
    found = make_tokenizer(str(path))
    assert isinstance(found, PublishedTokenizer)
    return found


def test_tokens_that_only_the_config_has_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    made = byte_bpe()
    n = made.get_vocab_size()
    new = {
        str(n): {"content": "<new>", "special": True},
        str(n + 1): {"content": "newer", "normalized": True},
    }
    folder = write_tokenizer(tmp_path / "t", made, added_tokens_decoder=new, eos_token="<|end|>")
    ours, text = read(folder), "a<new>b newer <|end|>"
    assert ours.encode(text) == theirs(folder, text)
    assert {n, n + 1, n + 2} <= set(ours.encode(text)) and ours.eos == n + 2 and ours.needed == n + 3


def test_placeholders_outside_the_vocabulary_need_no_row_of_the_embedding(tmp_path: Path) -> None:
    ours = read(write_tokenizer(tmp_path / "t", unigram()))
    video = ours.find(ours.placeholders["video"])
    assert video == ours.needed and ours.placeholder_of("video") == ours.pad < ours.needed


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "{{ messages }}"},
        {"eos_token": "<|im_end|>"},
        {"added_tokens_decoder": {"400": {"content": "<new>"}}},
    ],
)
def test_the_key_is_that_of_ids_template_and_markers(change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a", byte_bpe())
    first = read(folder).key
    assert first == read(write_tokenizer(tmp_path / "b", byte_bpe())).key != Tokenizer().key
    write_tokenizer(folder, byte_bpe(), **change)
    assert read(folder).key != first  # a changed file is read again


def test_a_vocabulary_is_that_of_its_ids(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a", byte_bpe())
    first = read(folder)
    write_tokenizer(folder, byte_bpe(), template="{{ messages }}")
    assert read(folder).vocabulary == first.vocabulary and read(folder).key != first.key
    assert read(write_tokenizer(tmp_path / "b", unigram())).vocabulary != first.vocabulary
    write_tokenizer(folder, byte_bpe(), eos_token="<|im_end|>")
    assert read(folder).vocabulary != first.vocabulary


def test_what_is_no_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; known: bytes, or a folder"):
        make_tokenizer("byts")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer.json \(it has vocab.json, of older formats\)"):
        make_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer.json that tokenizers reads"):
        make_tokenizer(str(tmp_path))
    made = tk.Tokenizer(tk.models.WordLevel({"a": 0}, unk_token="a"))
    folder = write_tokenizer(tmp_path / "t", made)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="nothing tells the end marker"):
        read_tokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(ValueError, match=r"eos_token_id=7 .* is not in its vocabulary"):
        read_tokenizer(folder)
    write_tokenizer(folder, byte_bpe(), template="{% for %}")
    with pytest.raises(ValueError, match="is no Jinja"):
        read_tokenizer(folder)


def test_the_tokenizer_of_a_run_is_there_at_any_moment(tmp_path: Path) -> None:
    """Wherever the writing is killed: looked at before each line of the code that writes."""
    old, new = (
        read_tokenizer(write_tokenizer(tmp_path / name, made))
        for name, made in (("a", byte_bpe()), ("b", unigram()))
    )
    run, found = tmp_path / "run", set[str]()
    run.mkdir()
    keep_tokenizer(old, run)

    def look(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename != tokenizer_files.__file__:
            return None
        assert (run / KEPT / "config.json").is_file(), "half a tokenizer"
        found.add(read_tokenizer(run / KEPT).key)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        keep_tokenizer(new, run)
        moved = (run / KEPT).stat().st_ino
        keep_tokenizer(new, run)
    finally:
        sys.settrace(before)
    assert found == {old.key, new.key} == {*found, read_tokenizer(run / KEPT).key}
    assert (run / KEPT).stat().st_ino == moved and [p.name for p in run.iterdir()] == [KEPT]
