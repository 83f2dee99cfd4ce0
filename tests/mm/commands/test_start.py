"""Checkpoints of another tokenizer, and folders without one, are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.commands.preflight import check_start
from mm.config.schema import from_mapping
from mm.errors import CheckpointError, Refused
from mm.inference.whole import load_whole
from parallel import checkpoint as store
from tests.mm.checkpoint.test_average import written
from tests.mm.data.tokenizers_made import byte_bpe, unigram, write_tokenizer
from tests.mm.harness import small


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run, other = tmp_path / "run", write_tokenizer(tmp_path / "other", unigram())
    saved = written(run, 1)
    kept = write_tokenizer(run / "tokenizer", byte_bpe())

    def start(tokenizer: Path | str, path: Path = saved) -> None:
        data = {"train": ["a.tar"], "tokenizer": str(tokenizer)}
        check_start(from_mapping(small(data=data, checkpoint={"weights": str(path)}), tmp_path))

    start(kept)
    for wrong in ("bytes", other):
        with pytest.raises(Refused, match=r"another vocabulary than the weights of .*run.tokenizer"):
            start(wrong)
    of_bytes = written(tmp_path / "bytes", 1)
    start("bytes", of_bytes)
    with pytest.raises(Refused, match=r"was trained on bytes, data.tokenizer is .*other; needed"):
        start(other, of_bytes)


def test_a_run_with_stages_names_their_folders(tmp_path: Path) -> None:
    for name in ("first", "second"):
        written(tmp_path / "run" / name, 2)
    assert len(store.published(tmp_path / "run" / "second")) == 1
    with pytest.raises(
        CheckpointError, match=r"those of its stages; needed: one of .*first, .*second.* last"
    ):
        load_whole(tmp_path / "run")
