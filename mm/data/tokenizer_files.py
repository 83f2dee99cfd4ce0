"""A tokenizer as files, so that other programs and later runs read the same ids from them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mm.data.published import FILES, GENERATION, TOKENIZER, PublishedTokenizer
from mm.data.tokenizer import AnyTokenizer, Tokenizer

KEPT = "tokenizer"  # folder beside the checkpoints of a run
BYTE_MARKERS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<item>"}


def write_tokenizer(tokenizer: AnyTokenizer, folder: Path, *, trained: bool) -> None:
    """Write a tokenizer to a folder, for transformers too: the files that it was read from, as they are.

    Where they name no special tokens, a tokenizer_config.json is made; generation_config.json has the ids.
    trained: here, with its end marker, which then ends an answer whatever that file says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {}
    if isinstance(tokenizer, PublishedTokenizer):
        file = tokenizer.file
        shutil.copyfile(file, folder / TOKENIZER)
        # A file of another name stands for itself: what lies in its folder is of another tokenizer.
        near = [n for n in (*FILES, GENERATION) if n != TOKENIZER and file.name == TOKENIZER]
        for name in near:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
        if (folder / GENERATION).is_file():
            given = json.loads((folder / GENERATION).read_text())
        names = {f"{n}_token": tokenizer.core.id_to_token(i) for n, i in _ids(tokenizer).items()}
    else:
        byte_level(tokenizer).save(str(folder / TOKENIZER))
        names = dict(BYTE_MARKERS)
    if not (folder / "tokenizer_config.json").is_file():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **names,
        }
        _write(folder / "tokenizer_config.json", config)
    said: dict[str, Any] = {**{f"{n}_token_id": i for n, i in _ids(tokenizer).items()}, **given}
    if trained and not tokenizer.stops <= {tokenizer.eos}:
        said["eos_token_id"] = sorted({*tokenizer.stops, tokenizer.eos})
    _write(folder / GENERATION, said)


def keep_tokenizer(tokenizer: AnyTokenizer, run_dir: Path) -> None:
    """Write a published tokenizer beside checkpoints; read_tokenizer() of KEPT there has the same key."""
    if not isinstance(tokenizer, PublishedTokenizer) or tokenizer.path == run_dir / KEPT:
        return
    folder = run_dir / f"{KEPT}.tmp"  # the one that is there stays until this is whole
    shutil.rmtree(folder, ignore_errors=True)
    write_tokenizer(tokenizer, folder, trained=False)
    ids = {f"{n}_token_id": i for n, i in _ids(tokenizer).items()}
    for kind, text in tokenizer.placeholders.items():
        if tokenizer.find(text) < tokenizer.needed:
            ids[f"{kind}_token_id"] = tokenizer.find(text)
    _write(folder / "config.json", ids)
    _put(folder, run_dir / KEPT)


def _put(folder: Path, at: Path) -> None:
    """Have a folder take the place of another one, if there is one, which is never missing meanwhile."""
    if at.is_dir() and _files(at) != _files(folder):
        _exchange(folder, at)
    if not at.exists():
        folder.rename(at)
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders in one step where the system can, which not every file system does."""
    at_cwd, exchange = -100, 2
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None or swap(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange):
        shutil.rmtree(other)


def _ids(tokenizer: AnyTokenizer) -> dict[str, int]:
    return {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def byte_level(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of bytes: a byte-level BPE without merges, whose letters have the bytes as ids."""
    # The letters that byte-level tokenizers give bytes: printable ones their own, others from 256 on.
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    letters = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}
    made = tokenizers.Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    # Their ids follow the bytes in this order.
    assert [tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.placeholder] == [256, 257, 258, 259]
    made.add_special_tokens(list(BYTE_MARKERS.values()))
    return made
