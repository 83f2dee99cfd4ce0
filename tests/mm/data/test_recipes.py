"""The recipes of docs/data_recipes.md: its own commands and configs, on miniatures in published formats."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.cli import main
from mm.data.index import load_index
from mm.data.tokenizer import make_tokenizer
from tests.mm.data.test_layouts import picture, turns
from tests.mm.harness import free_port, run_job
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "data_recipes.md").read_text()
FETCHED = ("hf download ", "wget ", "tar -xzf ")  # the miniature is what these lines leave behind
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
WORDS = "What is seen? A boat, and it is heard. user: assistant: <image>"


def tone(samples: int, rate: int = 8000) -> bytes:
    """A tone as 16-bit wav."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((8000 * np.sin(np.arange(samples) / 4)).astype("<i2").tobytes())
    return buffer.getvalue()


def recording(kind: str) -> bytes:
    """Half a second of sound, in its own format where something here writes that."""
    sound = tone(8000, 16000)
    if importlib.util.find_spec("soundfile") is None:
        return sound
    import soundfile

    made, buffer = soundfile.read(io.BytesIO(sound)), io.BytesIO()
    soundfile.write(buffer, *made, format=kind)
    return buffer.getvalue()


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def onevision(folder: Path) -> None:
    """Seven rows of two sources; one is of text alone."""
    for source, n in (("chartqa(cauldron,llava_format)", 4), ("chartqa(other)", 3)):
        rows = []
        for k in range(n):
            image = None if k == 2 else {"bytes": picture(k), "path": f"{k}.png"}
            asked = "What is seen?" if k == 2 else "<image>\nWhat is seen?"
            said = turns(asked, f"A boat {k}.")
            rows.append({"id": f"{source}{k}", "image": image, "conversations": said, "data_source": source})
        table(folder / "downloads" / "onevision" / source / "train-00000-of-00001.parquet", rows)


def obelics(folder: Path) -> None:
    """Six documents; a picture of the last is gone."""
    rows = []
    for k in range(6):
        url = f"https://host{k}.org/a%20b/p.png?w={k}"
        kept = folder / "downloads" / "pictures" / f"host{k}.org" / "a b" / f"p.png?w={k}"
        if k < 5:
            kept.parent.mkdir(parents=True)
            kept.write_bytes(picture(k))
        rows.append({"images": [None, url, None], "metadata": "[]", "general_metadata": "{}",
                     "texts": [f"A boat {k}.", None, "It is seen."]})  # fmt: skip
    table(folder / "downloads" / "obelics" / "data" / "train-00000-of-01335.parquet", rows)


def librispeech(folder: Path) -> None:
    at = folder / "downloads" / "LibriSpeech" / "train-clean-100" / "84" / "121123"
    at.mkdir(parents=True)
    for k in range(3):
        (at / f"84-121123-000{k}.flac").write_bytes(recording("FLAC"))
    (at / "84-121123.trans.txt").write_text("".join(f"84-121123-000{k} A BOAT {k}\n" for k in range(3)))


def common_voice(folder: Path) -> None:
    """A sentence with a quotation mark of its own, as the tables have them unescaped."""
    at = folder / "downloads" / "cv-corpus-17.0-2024-03-15" / "eo"
    (at / "clips").mkdir(parents=True)
    rows = ["client_id\tpath\tsentence_id\tsentence\tup_votes"]
    for k in range(3):
        (at / "clips" / f"common_voice_eo_{k}.mp3").write_bytes(recording("MP3"))
        rows.append(f'c{k}\tcommon_voice_eo_{k}.mp3\ts{k}\tLi diris "boato {k}\t2')
    (at / "train.tsv").write_text("\n".join(rows) + "\n")


SMALL = ["train.steps=2", "train.global_batch=2", "run.nproc=1", "checkpoint.every=0"]
RECIPES = {
    "LLaVA-OneVision": (onevision, 7, 0),
    "OBELICS": (obelics, 5, 1),
    "LibriSpeech": (librispeech, 3, 0),
    "Common Voice": (common_voice, 3, 0),
}  # by heading: what makes the miniature, its samples, what is left out


def blocks(heading: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks under a heading."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


def models(folder: Path) -> None:
    """Small models in the published format, and a tokenizer with a chat template, where the page has them."""
    from examples import two_stages

    two_stages.write_tokenizer(folder / "llm", [WORDS])
    two_stages.write_models(folder)
    (folder / "llm" / "chat_template.jinja").write_text(TEMPLATE)


def tokenizer(folder: Path) -> None:
    from examples import two_stages

    two_stages.write_tokenizer(folder / "llm", [WORDS])
    (folder / "llm" / "chat_template.jinja").write_text(TEMPLATE)


def follow(heading: str, *, train: bool) -> None:
    """Run the commands under a heading in the working folder."""
    found = list(blocks(heading))
    shared = [text for h in RECIPES for kind, text in blocks(h) if kind == "yaml"]
    for text in shared:
        Path(text.partition("\n")[0].removeprefix("# ")).write_text(text)
    for line in "\n".join(text for kind, text in found if kind == "bash").replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if line.startswith(FETCHED):
            continue
        if words[:2] == ["python", "-c"]:
            assert words[3] == ">"
            with open(words[4], "w") as out, contextlib.redirect_stdout(out):
                exec(words[2], {})
        elif words[3] == "train":
            small = [
                "train.steps=2",
                "train.global_batch=2",
                "run.nproc=1",
                "data.context=512",
                "checkpoint.every=0",
            ]
            if train:
                ended = run_job([*words[3:], *small], free_port())
                assert ended.code == 0, ended.err
        else:
            assert words[:4] == ["python", "-m", "mm", "data"]
            assert main([*words[3:], *(["--workers", "1"] if words[4] == "convert" else [])]) == 0


def prepared(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if RECIPES[heading][0] in (onevision, obelics):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(folder)
    RECIPES[heading][0](folder)


@pytest.mark.parametrize("heading", RECIPES)
def test_the_pages_commands_make_the_data(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(heading, tmp_path, monkeypatch)
    tokenizer(tmp_path / "models")
    follow(heading, train=False)
    (out,) = (tmp_path / "data").iterdir()
    index = load_index([f"data/{out.name}/*.tar"], tmp_path, tokenizer=make_tokenizer("models/llm"))
    bad = (out / "bad.jsonl").read_text().splitlines()
    _, samples, left_out = RECIPES[heading]
    made = sum(json.loads(p.read_text())["samples"] for p in (out / ".convert").glob("*.json"))
    assert made == samples and len(bad) == left_out, bad
    assert len(index.samples) == samples and not index.broken
    if heading == "OBELICS":
        urls = Path("urls.txt").read_text().splitlines()
        assert len(urls) == 6 and "as wget -x writes it" in bad[0] and urls[-1] in bad[0]


@pytest.mark.slow
@pytest.mark.parametrize("heading", RECIPES)
def test_the_pages_jobs_run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(heading, tmp_path, monkeypatch)
    models(tmp_path / "models")
    follow(heading, train=True)
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tokens" in line] == [1, 2]
    (module,) = {m for line in lines for m in line.get("grad_norm_by_module", {})} - {"llm"}
    assert all(line["grad_norm_by_module"][module] > 0 for line in lines if "tokens" in line)
