"""Asking trained models: prompts as training has them, whole models from any folder, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import mm
from llm.decode import Prompt, Sampling, generate
from mm.cli import main
from mm.config.schema import load_config
from mm.data.index import load_index
from mm.data.published import read_tokenizer
from mm.data.reader import ShardReader
from mm.data.sample import Sample
from mm.data.tokenizer import Tokenizer
from mm.errors import CheckpointError, DataError, Refused
from mm.inference.answer import TextStream, answer
from mm.inference.prompt import read_prompt, sample_of
from mm.inference.whole import WholeModel, load_whole
from mm.plan.blueprint import draw_up
from mm.ranks.feed import prepare
from mm.ranks.job import assembler_of
from mm.ranks.launch import RankInfo
from parallel import checkpoint as store
from parallel.topology.axis import Axes
from tests.llm.oracle import oracle, save
from tests.mm.data.tokenizers_made import CHATML, KINDS, TEXTS, byte_bpe, write_tokenizer
from tests.mm.harness import CONFIGS, free_port, run_job, small

DIGITS = str(CONFIGS / "data" / "digits-train-*.tar")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a published tokenizer, whose own folder is gone since."""
    base = tmp_path_factory.mktemp("run")
    folder = write_tokenizer(base / "t", byte_bpe(), template=CHATML)
    (folder / "config.json").write_text('{"image_token_id": 5, "pad_token_id": 2}')
    raw = small(
        run={"dir": str(base / "run")},
        data={"train": [DIGITS], "tokenizer": str(folder)},
        train={"steps": 2, "dtype": "float64"},
        checkpoint={"every": 2},
    )
    (base / "c.yaml").write_text(yaml.safe_dump(raw))
    ended = run_job(["train", str(base / "c.yaml")], free_port())
    assert ended.code == 0, ended.err
    folder.rename(base / "moved")
    return base / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> WholeModel:
    return load_whole(run)


def digits() -> Iterator[tuple[Sample, dict[str, Any], dict[str, bytes]]]:
    """Samples with their json and payloads."""
    reader = ShardReader()
    for sample in load_index([DIGITS], CONFIGS).samples[:8]:
        payloads = {seg.part.name: reader.read(sample, seg.part) for seg in sample.segments if seg.part}
        yield sample, json.loads(reader.read(sample, sample.json)), payloads
    reader.close()


def test_the_weights_are_those_of_the_checkpoint(run: Path, model: WholeModel) -> None:
    path = store.published(run)[-1]
    held = {f"llm.{k}": t for k, t in model.llm.state_dict().items()}
    for name, encoder in model.encoders.items():
        held |= {f"{name}.{k}": t for k, t in encoder.state_dict().items()}
    stored = {k: torch.empty(s, dtype=d) for k, (s, d) in store.describe(path).items() if ".adam." not in k}
    store.load(path, stored)
    assert stored.keys() == held.keys() and all(held[k].equal(t) for k, t in stored.items())
    assert not any(m.training for m in model.llm.modules())
    assert read_tokenizer(run / "tokenizer").key == read_tokenizer(run.parent / "moved").key
    assert load_whole(path, torch.bfloat16).dtype == torch.bfloat16


def test_a_prompt_is_what_training_packs(run: Path, model: WholeModel) -> None:
    """Ids, rows and their places, of samples with pictures and sounds."""
    raw = yaml.safe_load((run.parent / "c.yaml").read_text())
    raw["data"]["tokenizer"] = str(run / "tokenizer")
    (run.parent / "d.yaml").write_text(yaml.safe_dump(raw))
    blueprint = draw_up(load_config(run.parent / "d.yaml"), 1)
    axes = {m: Axes() for m in blueprint.modules}
    assembler = assembler_of(blueprint, RankInfo(0, 1, torch.device("cpu")), axes)
    index = {s.key: s for s in load_index([DIGITS], CONFIGS, tokenizer=model.tokenizer).samples}
    for old, written, payloads in digits():
        micro = prepare(0, [index[old.key]], assembler).micro[0]
        prompt = read_prompt(model, written, payloads)
        assert micro.llm is not None
        assert prompt.ids.tolist() == micro.llm.ids[: len(prompt.ids)].tolist()
        assert micro.llm.ids[len(prompt.ids)] == model.tokenizer.eos
        for name, items in micro.items.items():
            rows = model.encoders[name](items).values
            torch.testing.assert_close(prompt.rows[name], rows, rtol=1e-12, atol=1e-12)
            assert prompt.positions[name].tolist() == micro.llm.row_positions[name].tolist()


def test_the_command_streams_the_answer_and_writes_it(
    run: Path, model: WholeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, payloads = next(x for x in digits() if any("png" in name for name in x[2]))
    picture = tmp_path / "p.png"
    picture.write_bytes(next(p for name, p in payloads.items() if name.endswith("png")))
    out = tmp_path / "out.json"
    argv = [
        "generate",
        str(run),
        "--text",
        "sees ",
        "--image",
        str(picture),
        "--json",
        str(out),
        "--tokens",
        "9",
    ]
    assert main(argv) == 0
    said = json.loads(out.read_text())
    assert said.keys() == {"text", "ids"} and capsys.readouterr().out == said["text"] + "\n"
    sample, files = sample_of(model, "sees ", [("image", picture)])
    assert sample == {"segments": [{"vision": "0.png"}, {"text": "sees "}]}
    expected = generate(model.llm, [read_prompt(model, sample, files)], 9, stops=model.stops)[0]
    assert said["ids"] == expected and said["text"] == model.tokenizer.decode(expected)
    assert main([*argv, "--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]) == 0
    drawn = json.loads(out.read_text())["ids"]
    assert main([*argv, "--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]) == 0
    assert json.loads(out.read_text())["ids"] == drawn != expected
    assert (
        main(["generate", str(run), "--chat", "--text", "hi", "--image", str(picture), "--tokens", "2"]) == 0
    )


def test_a_chat_ends_at_the_end_of_a_turn(model: WholeModel) -> None:
    sample, files = sample_of(model, "hi", [], chat=True)
    prompt = read_prompt(model, sample, files)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids.tolist() == model.tokenizer.encode(text)
    with torch.no_grad():  # what follows is the end of a turn, which alone ends a chat
        kept = model.llm.head.clone()
        model.llm.head.zero_()
        model.llm.head[4] = model.llm.states(*states_of(prompt))[-1]
        try:
            assert list(answer(model, prompt, 5, chat=True)) == [4]
            assert len(list(answer(model, prompt, 3))) == 3
        finally:
            model.llm.head.copy_(kept)


def states_of(prompt: Prompt) -> Any:
    from llm.model import LLMBatch
    from llm.moe import ForwardContext
    from parallel.sequence.packed import Packing

    packing = Packing.of([len(prompt.ids)])
    batch = LLMBatch(prompt.ids, prompt.ids, packing, len(prompt.ids), {})
    return batch, {}, ForwardContext(packing, len(prompt.ids))


def test_a_published_folder_is_asked_as_transformers_asks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    theirs = oracle("M*-E", vocab_size=512, dtype=torch.float32).eval()
    folder = save(theirs, tmp_path / "m")
    write_tokenizer(folder, byte_bpe(), template=CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer("the quick", return_tensors="pt")
    expected = theirs.generate(given["input_ids"], do_sample=False, max_new_tokens=12)[
        0, given["input_ids"].shape[1] :
    ]
    out = tmp_path / "out.json"
    asks = ["--text", "the quick", "--tokens", "12", "--json", str(out)]
    assert main(["generate", str(folder), *asks]) == 0
    assert json.loads(out.read_text())["ids"] == expected.tolist()
    assert mm.load(folder).encoders == {}
    # Imported and exported again, it is the same model with the same tokenizer for both programs.
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "in")]) == 0
    assert main(["generate", str(tmp_path / "in"), *asks]) == 0
    assert json.loads(out.read_text())["ids"] == expected.tolist()
    path = store.published(tmp_path / "in")[-1]
    assert main(["checkpoint", "export", str(path), str(tmp_path / "out")]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(t)["input_ids"] for t in TEXTS] == [tokenizer(t)["input_ids"] for t in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    assert main(["generate", str(folder), "--image", str(folder / "config.json")]) == 2
    capsys.readouterr()


def test_an_export_of_a_run_is_read_by_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = store.published(run)[-1]
    assert main(["checkpoint", "export", str(path), str(tmp_path / "out")]) == 0
    ours, theirs = read_tokenizer(run / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [ours.encode(t) for t in TEXTS] == [
        theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS
    ]
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def test_bytes_are_exported_as_a_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from mm.data.tokenizer_files import write_tokenizer as write

    ours = Tokenizer()
    write(ours, tmp_path / "b", trained=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == ours.encode_texts(TEXTS)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    assert theirs.decode(ours.encode(TEXTS[2])) == TEXTS[2]


def test_a_stream_is_the_whole_text(tmp_path: Path) -> None:
    tokenizers: list[Any] = [Tokenizer()]
    for i, kind in enumerate(KINDS):
        tokenizers.append(read_tokenizer(write_tokenizer(tmp_path / str(i), KINDS[kind]())))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(8, 250), max_size=24))
    def check(ids: list[int]) -> None:
        for tokenizer in tokenizers:
            stream = TextStream(tokenizer)
            assert "".join([*(stream.add(n) for n in ids), stream.rest()]) == tokenizer.decode(ids)

    check()


def test_what_cannot_be_asked_is_refused_in_words(run: Path, model: WholeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; needed: the folder of a run"):
        load_whole(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no checkpoint and no config.json"):
        load_whole(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        load_whole(save(oracle("*-"), tmp_path / "bare"))
    with pytest.raises(DataError, match=r"for module smell; the model has: audio, vision"):
        read_prompt(model, {"segments": [{"smell": "x"}]}, {})
    (tmp_path / "x.png").write_text("no picture")
    sample, files = sample_of(model, "", [("image", tmp_path / "x.png")])
    with pytest.raises(DataError, match="the prompt cannot be used"):
        read_prompt(model, sample, files)
    with pytest.raises(Refused, match="no encoder for an image; it has: none"):
        sample_of(replace(model, encoders={}, uses={}), "", [("image", tmp_path / "x.png")])
    for argv in (
        ["generate"],
        ["generate", str(run), "--tokens", "0"],
        ["generate", str(run), "--top-p", "2"],
    ):
        assert main(argv) == 2
    assert main(["generate", str(run), "--image", str(tmp_path / "absent.png")]) == 2
    assert Sampling().temperature == 0
