"""Bad input at the command line: each kind is named, with what would work; no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mm.cli import main
from tests.encoders import published, speech
from tests.encoders.helpers import png, wav
from tests.encoders.media.test_pictures import bomb
from tests.llm.oracle import oracle, save
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, word_piece, write_tokenizer
from tests.mm.harness import CONFIGS, small
from tests.mm.shards import write_shard

ANSWERED: dict[str, Any] = {
    "key": "s0",
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "parts": {},
}
CHAT: dict[str, Any] = {"key": "s0", "messages": [{"role": "user", "content": "hello"}], "parts": {}}


class Made(NamedTuple):
    """Folders that are whole, and one to write into: base."""

    base: Path
    model: Path
    vision: Path
    audio: Path


@pytest.fixture
def made(tmp_path: Path, whole: Made) -> Made:
    """Copies, to be damaged."""
    for folder in (whole.model, whole.vision, whole.audio):
        shutil.copytree(folder, tmp_path / folder.name)
    return Made(tmp_path, *(tmp_path / f.name for f in (whole.model, whole.vision, whole.audio)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("whole")
    model = save(oracle("*-", vocab_size=512, dtype=torch.float32), base / "model")
    write_tokenizer(model, byte_bpe(), template=CHATML)
    vision = published.saved(published.oracle("qwen2_5_vl", torch.float32), base / "vision")
    audio = speech.folder(speech.model("whisper", 0), base / "audio")
    return Made(base, model, vision, audio)


def changed(folder: Path, **values: Any) -> Path:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **values}))
    return folder


def without_shard(folder: Path) -> Path:
    """The weights in two files, of which one is gone."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, *rest = sorted(tensors)
    save_file({first: tensors[first]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    files = {first: "model-00001-of-00002.safetensors"}
    files |= {name: "model-00002-of-00002.safetensors" for name in rest}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def other_shapes(folder: Path) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: (tensors[key].ndim > 1, key))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, {"format": "pt"})
    return folder


def other_tokenizer(folder: Path) -> Path:
    """A tokenizer with more tokens than the model embeds."""
    tokenizer = byte_bpe()
    tokenizer.add_tokens([f"<word {i}>" for i in range(600)])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def config(m: Made, *, vision: Path | None = None, audio: Path | None = None, **sections: Any) -> str:
    """A config of a run with these encoders' folders."""
    raw = small(run={"dir": str(m.base / "run")}, **sections)
    for name, encoder, folder in (("vision", "qwen2_5_vl", vision), ("audio", "whisper", audio)):
        if folder is None:
            continue
        kind = {"kind": "linear"}
        raw["model"][name] = {"encoder": encoder, "weights": str(folder), "projector": kind}
    if "data" not in sections:
        raw["data"]["train"] = [str(CONFIGS / "data" / "digits-train-*.tar")]
    (m.base / "c.yaml").write_text(yaml.safe_dump(raw))
    return str(m.base / "c.yaml")


def with_sample(m: Made, sample: dict[str, Any], **more: Any) -> str:
    """A config of a run whose only sample is this."""
    shard = write_shard(m.base / "x-0.tar", [sample])
    return config(
        m, data={"train": [str(shard)], "context": 8192}, train={"steps": 1, "global_batch": 1}, **more
    )


def item(module: str, name: str, payload: bytes) -> dict[str, Any]:
    return {"key": "s0", "segments": [{module: name}, {"text": "x"}], "parts": {name: payload}}


Case = tuple[str, int, Callable[[Made], list[str]], tuple[str, ...]]
CASES: list[Case] = [
    ("unknown family, asked", 4, lambda m: ["generate", str(changed(m.model, model_type="mamba9"))],
     ("model_type='mamba9'", "known")),
    ("unknown family, evaluated", 2,
     lambda m: ["eval", str(changed(m.model, model_type="mamba9")), "data.eval=[x]"],
     ("mamba9", "known")),
    ("unknown family, imported", 4,
     lambda m: ["checkpoint", "import", str(changed(m.model, model_type="mamba9")), str(m.base / "out")],
     ("mamba9", "known")),
    ("unknown family, trained", 2,
     lambda m: ["train", config(m), f"model.llm.preset={changed(m.model, model_type='mamba9')}"],
     ("mamba9", "known")),
    ("unknown encoder", 2, lambda m: ["train", config(m, vision=changed(m.vision, model_type="eye9"))],
     ("model.vision.weights", "eye9", "known")),
    ("no shard, asked", 4, lambda m: ["generate", str(without_shard(m.model))],
     ("model-00002-of-00002.safetensors", "needed")),
    ("no shard, imported", 4,
     lambda m: ["checkpoint", "import", str(without_shard(m.model)), str(m.base / "out")],
     ("model-00002-of-00002.safetensors", "needed")),
    ("no shard, encoder", 2, lambda m: ["train", config(m, vision=without_shard(m.vision))],
     ("model.vision.weights", "model-00002-of-00002.safetensors", "needed")),
    ("shapes, asked", 4, lambda m: ["generate", str(other_shapes(m.model))],
     ("shape", "lm_head.weight", "expected")),
    ("shapes, imported", 4,
     lambda m: ["checkpoint", "import", str(other_shapes(m.model)), str(m.base / "out")], ("shape",)),
    ("shapes, encoder", 2, lambda m: ["train", config(m, vision=other_shapes(m.vision))],
     ("model.vision.weights", "shape")),
    ("vocabulary, asked", 4,
     lambda m: ["generate", str(other_tokenizer(m.model)), "--text", "<word 500>"], ("512", "needed")),
    ("vocabulary, trained", 2,
     lambda m: ["train", config(m), f"model.llm.preset={m.model}", f"checkpoint.weights={m.model}",
                f"data.tokenizer={other_tokenizer(Path(shutil.copytree(m.model, m.base / 'other')))}"],
     ("the tokenizer", "needs at least 1000", "needed")),
    ("vocabulary of other tokens", 2,
     lambda m: ["train", config(m), f"model.llm.preset={m.model}", f"checkpoint.weights={m.model}",
                f"data.tokenizer={write_tokenizer(m.base / 'pieces', word_piece())}"],
     ("checkpoint.weights", "another vocabulary", "needed")),
    ("vocabulary of a preset's tokens", 2,
     lambda m: ["train", config(m), f"model.llm.preset={m.model}",
                f"data.tokenizer={write_tokenizer(m.base / 'pieces', word_piece())}"],
     ("model.llm.preset", "another vocabulary", "its config.json alone")),
    ("narrow picture, trained", 3,
     lambda m: ["train", with_sample(m, item("vision", "a.png", png(1, 20_000, 0, "RGB")), vision=m.vision)],
     ("1x20000", "needed")),
    ("picture bomb, trained", 3,
     lambda m: ["train", with_sample(m, item("vision", "a.png", bomb(9_500, 9_500)), vision=m.vision)],
     ("a.png: 9500x9500 pixels", "data.limits.pixels=89478485", "needed")),
    ("limit of a config, trained", 3,
     lambda m: ["train", with_sample(m, item("vision", "a.png", png(40, 60, 0, "RGB")), vision=m.vision),
                "data.limits.pixels=2399"],
     ("a.png of sample s0", "40x60 pixels are 2400", "data.limits.pixels=2399")),
    ("silence, trained", 3,
     lambda m: ["train", with_sample(m, item("audio", "a.wav", wav(0)), audio=m.audio)],
     ("zero samples", "needed")),
    ("chat without an answer", 3,
     lambda m: ["train", with_sample(m, CHAT), f"data.tokenizer={m.model}"],
     ("without an assistant turn", "nothing to learn")),
    ("chat of bytes", 3, lambda m: ["train", with_sample(m, ANSWERED)], ("no chat template", "needed")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bad_input_is_named(case: Case, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    _, code, argv, words = case
    line = argv(made)
    # A dry run checks what a run does before it starts ranks.
    found = main([*line, "--dry-run"] if line[0] == "train" else line)
    said = capsys.readouterr().err
    assert (found, [w for w in words if w not in said]) == (code, []), said
    assert "Traceback" not in said
    assert not (made.base / "out").exists()
    assert not list((made.base / "run").glob("step-*"))
