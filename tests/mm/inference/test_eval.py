"""Losses by modality and source and exact answers, on one process and under layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mm.cli import main
from mm.data.encode import encode_samples, parse_sample
from mm.data.index import load_index
from mm.data.published import read_tokenizer
from mm.data.reader import ShardReader
from mm.errors import DataError
from mm.inference.exact import normalised, questions_of, read_questions
from tests.encoders.helpers import png
from tests.llm.oracle import oracle, save
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, write_tokenizer
from tests.mm.harness import CONFIGS, free_port, run_job, run_rank, small
from tests.mm.shards import write_shard
from tests.slow import on_demand

DIGITS = [str(CONFIGS / "data" / f"digits-{kind}-*.tar") for kind in ("train", "eval")]
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp, ep": (2, ("layout.llm.tp=2", "layout.llm.ep=2", "layout.vision.tp=2")),
    "dp": (3, ()),
    "cp, pp": (4, ("layout.llm.cp=2", "layout.llm.pp=2", "layout.audio.cp=2")),
    "apart": (3, ("layout.llm.ranks=1-2", "layout.vision.ranks=0-0", "layout.audio.ranks=[2]")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("run")
    raw = small(
        run={"dir": str(base / "run"), "timeout_s": 30.0},
        data={"train": DIGITS[:1], "eval": DIGITS},
        eval={"samples": 40},
        train={"steps": 2},
        checkpoint={"every": 2},
    )
    (base / "c.yaml").write_text(yaml.safe_dump(raw))
    ended = run_job(["train", str(base / "c.yaml")], free_port())
    assert ended.code == 0, ended.err
    return base / "run"


def questions(folder: Path) -> Path:
    (folder / "a.png").write_bytes(png(8, 8))
    lines = [
        {"segments": [{"vision": "a.png"}, {"text": "sees "}], "answer": ["3", "three"]},
        {"segments": [{"text": "hears "}], "answer": "5"},
    ]
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "ask.jsonl"


def asks(run: Path, folder: Path, out: Path, *more: str) -> list[str]:
    ask = ["--ask", str(questions(folder)), "--ask-samples", "6", "--tokens", "6"]
    return ["eval", str(run), "--json", str(out), *ask, *more]


@pytest.mark.parametrize("name", on_demand(LAYOUTS, [n for n in LAYOUTS if n != "tp, ep"]))
def test_every_layout_has_the_losses_and_answers_of_one_process(
    name: str, run: Path, tmp_path: Path, ranks: Any
) -> None:
    world, overrides = LAYOUTS[name]
    one = run_job(asks(run, tmp_path, tmp_path / "one"), free_port())
    assert one.code == 0, one.err
    ended = ranks(world, run_rank, asks(run, tmp_path, tmp_path / "all", *overrides), free_port())
    assert [e.code for e in ended] == [0] * world, "".join(e.err for e in ended)
    alone, spread = (json.loads((tmp_path / x).read_text()) for x in ("one", "all"))
    assert spread["exact_match"] == alone["exact_match"] and spread["tokens"] == alone["tokens"]
    assert spread["loss"] == pytest.approx(alone["loss"], rel=1e-9)
    for by in ("loss_by_modality", "loss_by_source"):
        assert alone[by].keys() == spread[by].keys()
        for key, own in alone[by].items():
            assert spread[by][key]["tokens"] == own["tokens"]
            assert spread[by][key]["loss"] == pytest.approx(own["loss"], rel=1e-9)
        total = sum(own["loss"] * own["tokens"] for own in alone[by].values())
        assert total == pytest.approx(alone["loss"] * alone["tokens"], rel=1e-12)
    assert alone["loss_by_modality"].keys() == {"audio", "audio+vision", "vision"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert alone["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-12)  # of the run's own evaluation
    assert alone["exact_match"]["asked"] == 8 and "exact match" in one.out


def test_answers_are_compared_without_case_blanks_and_a_last_stop() -> None:
    for said, answer in (
        ("A  boat. ", "a boat"),
        ("\uff13", "3"),
        ("STRASSE", "stra\u00dfe"),
        ("x\n", "X ."),
    ):
        assert normalised(said) == normalised(answer)
    for said, answer in (("a boat!", "a boat"), ("3.5", "35"), ("", "a")):
        assert normalised(said) != normalised(answer)


def test_questions_of_samples_end_before_their_answer() -> None:
    index = load_index(DIGITS[1:], CONFIGS)
    found = questions_of(index.samples, 5)
    assert len(found) == 5
    for question, sample in zip(found, index.samples, strict=False):
        reader = ShardReader()
        written = json.loads(reader.read(sample, sample.json))["segments"]
        reader.close()
        assert question.answers[0] in [seg.get("text") for seg in written[len(question.sample["segments"]) :]]
        assert question.sample["segments"] == written[: len(question.sample["segments"])]
        assert len(question.payloads) == sum("text" not in seg for seg in question.sample["segments"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", r"line 1: .*needed: an object with segments or messages"),
        ('{"segments": []}', "its answer is None"),
        ('{"segments": [], "answer": []}', "its answer is"),
        ('{"answer": "3"}', "both segments and messages, or neither"),
        ('{"segments": [{"vision": "none.png"}], "answer": "3"}', "none.png: No such file"),
        ("", "has no question"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=why):
        read_questions(tmp_path / "a.jsonl")


def test_a_file_of_questions_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    for name in ("a.jsonl", "none.jsonl", "."):
        with pytest.raises(DataError, match="cannot be read"):
            read_questions(tmp_path / name)


def test_a_published_folder_has_the_losses_of_transformers(tmp_path: Path) -> None:
    """Of segments and of conversations, whose loss is on the assistant's turns."""
    theirs = oracle("M*-E", vocab_size=512, dtype=torch.float32).eval()
    folder = save(theirs, tmp_path / "m")
    write_tokenizer(folder, byte_bpe(), template=CHATML)
    said = [("the quick", "fox"), ("jumps over", "the dog")]
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said
    ]
    texts = [{"segments": [{"text": a, "loss": False}, {"text": b}]} for a, b in said]
    written = [{"key": f"s{i}", "parts": {}, **data} for i, data in enumerate([*chats, *texts])]
    write_shard(tmp_path / "x-0.tar", written)
    out = tmp_path / "out.json"
    argv = ["eval", str(folder), f"data.eval=[{tmp_path}/x-0.tar]", "--ask-samples", "2", "--json", str(out)]
    ended = run_job(argv, free_port())
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    tokenizer, nats, tokens = read_tokenizer(folder), 0.0, 0
    index = load_index([str(tmp_path / "x-0.tar")], CONFIGS, tokenizer=tokenizer)
    assert len(index.samples) == 4
    for sample, data in zip(index.samples, [*chats, *texts], strict=True):
        segments = encode_samples([parse_sample(json.dumps(data).encode())], tokenizer)[0]
        assert not isinstance(segments, str)
        ids, labels = [], []
        for seg in segments:
            ids += seg.ids or []
            labels += (seg.ids or []) if seg.loss else [-100] * len(seg.ids or [])
        if sample.markers:
            ids, labels = [tokenizer.bos, *ids, tokenizer.eos], [-100, *labels, tokenizer.eos]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1]
        target = torch.tensor(labels[1:])
        nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        tokens += int((target >= 0).sum())
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["exact_match"]["asked"] == 2


@pytest.mark.slow
def test_an_imported_language_model_has_the_losses_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save(oracle("M*-E", vocab_size=512, dtype=torch.float32), tmp_path / "m"), tmp_path / "out"
    bare = ["eval", str(tmp_path / "bare"), "--samples", "0", "--ask", str(questions(tmp_path))]
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "bare")]) == 0
    assert main(bare) == 2 and "was imported without a tokenizer" in capsys.readouterr().err
    write_tokenizer(folder, byte_bpe(), template=CHATML)
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "in")]) == 0
    texts = [{"segments": [{"text": "the quick", "loss": False}, {"text": "fox"}]}] * 3
    write_shard(tmp_path / "x-0.tar", [{"key": f"s{i}", "parts": {}, **x} for i, x in enumerate(texts)])
    found = []
    for path in (folder, tmp_path / "in"):
        asks = [f"data.eval=[{tmp_path}/x-0.tar]", "--ask-samples", "2", "--json", str(out)]
        ended = run_job(["eval", str(path), *asks], free_port())
        assert ended.code == 0, ended.err
        found.append({k: v for k, v in json.loads(out.read_text()).items() if k != "path"})
    assert found[0] == found[1] and found[0]["exact_match"]["asked"] == 2
    assert main(["eval", str(tmp_path / "in"), "--nproc", "2", "data.eval=[x.tar]"]) == 2
    assert "was imported, without a layout; needed: one process" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for argv, code, why in (
        ([str(run), "--samples", "-1"], 2, "--samples -1; needed: at least 0"),
        ([str(run), "--ask", str(tmp_path / "none")], 2, "no file"),
        ([str(run), "data.eval=[]"], 2, "no held-out data; needed: data.eval"),
        ([str(tmp_path / "none")], 4, "does not exist; needed: the folder of a run"),
        ([str(tmp_path / "m"), "data.eval=[x.tar]"], 4, "has neither model.safetensors nor"),
        ([], 2, "needed: eval PATH"),
    ):
        assert main(["eval", *argv]) == code, argv
        assert why in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_with_a_card_has_the_losses_and_answers_of_its_run(run: Path, tmp_path: Path) -> None:
    """Encoders that no published format holds are read from it too: a changed weight changes the losses."""
    last = run / "step-00000002"
    assert run_job(["checkpoint", "export", str(last), str(tmp_path / "out")], 0).code == 0

    def found(path: Path, *more: str) -> dict[str, Any]:
        ended = run_job([*asks(path, tmp_path, tmp_path / "json"), *more], free_port())
        assert ended.code == 0, ended.err
        out: dict[str, Any] = json.loads((tmp_path / "json").read_text())
        return out

    data = f"data.eval={json.dumps(DIGITS)}"
    theirs, ours = found(run), found(tmp_path / "out", data, "train.dtype=float64", "eval.samples=40")
    assert ours["exact_match"] == theirs["exact_match"] and ours["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    weights = tmp_path / "out" / "audio" / "model.safetensors"
    held = load_file(weights)
    save_file({name: t * 2 for name, t in held.items()}, weights, metadata={"format": "pt"})
    changed = found(tmp_path / "out", data, "train.dtype=float64", "eval.samples=40")
    for kind in ("audio", "vision"):
        same = changed["loss_by_modality"][kind]["loss"] == ours["loss_by_modality"][kind]["loss"]
        assert same == (kind == "vision")
    said = json.loads((tmp_path / "out" / "vision" / "config.json").read_text())
    said["options"]["heads"] = 1
    (tmp_path / "out" / "vision" / "config.json").write_text(json.dumps(said))
    ended = run_job(["eval", str(tmp_path / "out"), data], 0)
    assert ended.code == 2 and "has heads=1, not" in ended.err, ended.err
