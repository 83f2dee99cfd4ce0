"""The page of samples: whole as HTML, shows what is there, and nothing in a sample can act."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.cli import main
from mm.data.index import load_index
from mm.data.published import read_tokenizer
from mm.data.tokenizer import Tokenizer
from mm.pages.html import clean
from mm.pages.samples_page import choose, samples_page
from tests.mm.data.test_layouts import picture
from tests.mm.data.test_recipes import tone
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, write_tokenizer
from tests.mm.pages.strict_parser import Checked
from tests.mm.shards import write_shard

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;</div></style>"


def shown(tmp_path: Path, samples: list[dict[str, Any]]) -> Checked:
    write_shard(tmp_path / "a.tar", samples)
    index = load_index(["a.tar"], tmp_path)
    return Checked(samples_page(index, index.samples, Tokenizer()))


def test_a_page_shows_media_tokens_loss_and_dependence(tmp_path: Path) -> None:
    parts = {"img0.png": picture(7), "aud0.wav": tone(100)}
    segments = [
        {"vision": "img0.png"},
        {"audio": "aud0.wav"},
        {"text": "naïve", "loss": False},
        {"text": "3", "depends": "vision"},
    ]
    found = shown(tmp_path, [{"key": "k", "segments": segments, "parts": parts}])
    payloads = [base64.b64decode(s.partition(",")[2]) for s in found.sources]
    assert payloads == [parts["img0.png"], parts["aud0.wav"]]
    text = "".join(found.said)
    assert "6 read onlynaïve" in text and "1 learned, depends on vision3" in text
    assert f"vision: img0.png, {len(picture(7))} bytes, height 8, width 8" in text


@settings(max_examples=4, deadline=None)
@given(st.text(), st.text(min_size=1).filter(lambda t: t not in ("text", "loss", "depends")))
def test_nothing_that_a_sample_says_acts(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str
) -> None:
    name = name.encode(errors="ignore").decode() or "m"
    text = text.encode(errors="ignore").decode() + EVIL
    segments = [{f"{name}{EVIL}": "x.png"}, {"text": text, "depends": f"{name}{EVIL}"}]
    sample = {"key": "k", "segments": segments, "parts": {"x.png": picture()}}
    found = shown(tmp_path_factory.mktemp("a"), [sample])
    assert clean(text) in "".join(found.said) and len(found.sources) == 1


def test_names_of_files_are_content_too(tmp_path: Path) -> None:
    key, part = "<script>k", 'x"onerror="a.png'
    found = shown(tmp_path, [{"key": key, "segments": [{"vision": part}], "parts": {part: picture()}},
                             {"key": "b", "segments": [{"vision": EVIL}], "parts": {}}])  # fmt: skip
    text = "".join(found.said)
    assert key in text and part in text and "1 broken" in text and "<script>alert(1)" in text


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"key": "k", "segments": [{"text": "abc"}], "parts": {}}])
    index = load_index(["a.tar"], tmp_path)
    shard.write_bytes(shard.read_bytes().replace(b"abc", b"abd"))
    assert "cannot be used:" in "".join(Checked(samples_page(index, index.samples, Tokenizer())).said)


def test_samples_are_chosen_by_key_or_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"key": f"s{k}", "segments": [{"text": f"t{k}"}], "parts": {}} for k in range(12)]
    shard = write_shard(tmp_path / "a.tar", samples)
    index = load_index(["a.tar"], tmp_path)
    assert [s.key for s in choose(index.samples, ["s7", "3"], 8)] == ["s7", "s3"]
    assert len(choose(index.samples, [], 8)) == 8
    out = tmp_path / "page.html"
    assert main(["data", "inspect", str(shard), "--html", str(out), "--sample", "s7", "--sample", "3"]) == 0
    assert [s for s in Checked(out.read_text()).said if re.fullmatch(r"s\d+", s)] == ["s7", "s3"]
    assert main(["data", "inspect", str(shard), "--html", str(out), "--sample", "x"]) == 2
    assert "no sample x; needed: keys such as s0" in capsys.readouterr().err


def test_tokens_of_a_template_are_shown_and_do_not_act(tmp_path: Path) -> None:
    """A token may be a whole tag, as <s> is here."""
    tokenizer = read_tokenizer(write_tokenizer(tmp_path / "t", byte_bpe(), template=CHATML))
    chat = [{"role": "user", "content": "What is <s>seen</s>?"}, {"role": "assistant", "content": "東京"}]
    write_shard(tmp_path / "a.tar", [{"key": "k", "messages": chat, "parts": {}}])
    index = load_index(["a.tar"], tmp_path, tokenizer=tokenizer)
    text = "".join(Checked(samples_page(index, index.samples, tokenizer)).said)
    assert "<|im_start|>user\nWhat is <s>seen</s>?<|im_end|>" in text and " learned" in text
