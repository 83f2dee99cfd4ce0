"""Folders of Megatron-Energon: their own description says what a sample is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm.data.convert.run import Request, convert
from mm.data.index import load_index
from mm.errors import DataError
from tests.mm.data.test_layouts import picture, write


def energon(folder: Path, dataset: str) -> Path:
    (folder / ".nv-meta").mkdir(parents=True)
    (folder / ".nv-meta" / "dataset.yaml").write_text(dataset)
    return folder


def test_an_energon_folder_says_what_its_parts_are(tmp_path: Path) -> None:
    fields = "field_map: {image: jpg, context: 'json[question]', answers: 'json[answers]'}\n"
    kind = "sample_type:\n  __module__: megatron.energon\n  __class__: VQASample\n"
    base = energon(tmp_path / "e", kind + fields)
    (base / "shards").mkdir()
    asked = json.dumps({"question": "What?", "answers": ["boat", "ship"]}).encode()
    write(base / "shards" / "a.tar", {"k": {"jpg": picture(form="JPEG"), "json": asked}})
    sample = load_index(["shards/a.tar"], base).samples[0]
    assert [(s.kind, s.tokens, s.loss, s.depends) for s in sample.segments] == [
        ("vision", 0, True, None), ("text", 5, False, None), ("text", 4, True, "vision")]  # fmt: skip
    split = {"split_parts": {"train": ["shards/{a..a}.tar"], "val": ["shards/none.tar"]}}
    (base / ".nv-meta" / "split.yaml").write_text(json.dumps(split))
    request = Request((str(base),), tmp_path / "o", split="train")
    assert convert(request, 1, lambda line: None)["samples"] == 1
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        convert(Request((str(base),), tmp_path / "p", split="test"), 1)
    (base / ".nv-meta" / "dataset.yaml").write_text("sample_loader: sample_loader.py:sample_loader\n")
    with pytest.raises(DataError, match="which is not run"):
        load_index(["shards/a.tar"], base)
