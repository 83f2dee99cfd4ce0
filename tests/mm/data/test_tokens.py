"""The token index: lengths in tokens of a tokenizer, and the labels that training then has."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mm.commands.preflight import check_start
from mm.config.schema import from_mapping
from mm.data import tokens
from mm.data.building import kept_indexes
from mm.data.columns.file import content_of
from mm.data.columns.table import join
from mm.data.forks import in_forks
from mm.data.index import load_index
from mm.data.inspect import index_text, inspect_text
from mm.data.published import PublishedTokenizer, read_tokenizer
from mm.data.sample import Index
from mm.errors import DataError, Refused
from mm.plan.blueprint import draw_up
from mm.plan.inputs import sample_length, supervised_tokens
from mm.plan.select import select
from mm.ranks.feed import prepare
from mm.ranks.job import assembler_of, open_index
from mm.ranks.launch import RankInfo
from mm.virtual.samples import VirtualAssembler
from parallel.topology.axis import Axes
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, unigram, write_tokenizer
from tests.mm.harness import small
from tests.mm.shards import npy, write_shard

TEXT = "What is seen? The quick brown fox"
ANSWER = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "A boat."}]
JSONS: dict[str, Any] = {
    "plain": {"segments": [{"text": TEXT, "loss": False}, {"text": " the dog"}]},
    "chat": {"messages": ANSWER},
    "silent": {"messages": ANSWER[:1]},
    "odd": {"messages": [*ANSWER, {"role": "user", "content": "<image>"}]},
}


def write_jsons(path: Path, jsons: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, data in jsons.items():
            payload = json.dumps(data).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> PublishedTokenizer:
    return read_tokenizer(write_tokenizer(tmp_path / "t", byte_bpe(), template=CHATML))


def test_lengths_are_in_tokens_and_what_cannot_be_encoded_is_named(
    tmp_path: Path, tokenizer: PublishedTokenizer
) -> None:
    write_jsons(
        tmp_path / "a.tar", {**JSONS, "bad": {"messages": [*ANSWER, {"role": "user", "content": "\ufdd0"}]}}
    )
    index = load_index(["a.tar"], tmp_path, tokenizer=tokenizer)
    plain, chat, odd = index.samples
    assert [s.tokens for s in plain.segments] == [
        len(tokenizer.encode(TEXT)),
        len(tokenizer.encode(" the dog")),
    ]
    assert plain.markers and not chat.markers and [s.id for s in index.samples] == [0, 1, 2]
    assert [s.loss for s in chat.segments] == [False, True, False] == [s.loss for s in odd.segments]
    assert {(b.key, b.why.split(",")[0]) for b in index.broken} == {
        ("silent", "it is a chat without an assistant turn"),
        ("bad", "a message has the noncharacter U+FDD0 or U+FDD1"),
    }
    in_bytes = load_index(["a.tar"], tmp_path)
    assert [s.key for s in in_bytes.samples] == ["plain"] and len(in_bytes.broken) == 4


def test_the_index_is_kept_for_each_tokenizer(tmp_path: Path, tokenizer: PublishedTokenizer) -> None:
    shard = write_jsons(tmp_path / "a.tar", JSONS)
    first = load_index(["a.tar"], tmp_path, tokenizer=tokenizer)
    other = read_tokenizer(write_tokenizer(tmp_path / "u", unigram(), template=CHATML))
    assert load_index(["a.tar"], tmp_path, tokenizer=other).samples != first.samples
    files = {t.key[:12]: list(tmp_path.glob(f"shards-*.tokens-{t.key[:12]}")) for t in (tokenizer, other)}
    assert [len(found) for found in files.values()] == [1, 1]
    with mock.patch.object(tokens, "encode_samples", side_effect=AssertionError):
        assert load_index(["a.tar"], tmp_path, tokenizer=tokenizer) == first
    (file,) = files[tokenizer.key[:12]]
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole.replace(b"names", b"nomes", 1), b"[]"):
        file.write_bytes(damaged)
        assert load_index(["a.tar"], tmp_path, tokenizer=tokenizer) == first and file.read_bytes() == whole
    write_jsons(shard, dict(list(JSONS.items())[:2]))  # another shard of the same name
    assert [s.key for s in load_index(["a.tar"], tmp_path, tokenizer=tokenizer).samples] == ["plain", "chat"]
    assert index_text(["a.tar"], tmp_path, tokenizer).endswith("2 samples, 0 broken")
    assert "tokens a sample" in inspect_text(["a.tar"], tmp_path, tokenizer)


def config(tmp_path: Path, **data: Any) -> Any:
    raw = small(
        data={"train": ["a.tar"], "tokenizer": str(tmp_path / "t"), **data}, train={"global_batch": 3}
    )
    raw["model"] = {"llm": {**raw["model"]["llm"], "mtp_layers": 2}}
    return from_mapping(raw, tmp_path)


def test_ids_and_labels_of_a_step(tmp_path: Path, tokenizer: PublishedTokenizer) -> None:
    """Every label is the next token where that is learned, and no sample's first token is one."""
    write_jsons(tmp_path / "a.tar", JSONS)
    blueprint = draw_up(config(tmp_path, max_skipped=0.5), 1)
    assert blueprint.llm.vocab_size == tokenizer.vocab_size
    index = open_index(blueprint, ["a.tar"], tmp_path)
    rank = RankInfo(0, 1, torch.device("cpu"))
    assembler = assembler_of(blueprint, rank, {"llm": Axes()})
    made = prepare(0, index.samples, assembler)
    assert not made.bad
    llm = made.micro[0].llm
    assert llm is not None
    at = 0
    expected = {s.key: expect(s.key, tokenizer) for s in index.samples}
    for sample in (made.plan.microbatches[0].sample(j) for j in made.plan.microbatches[0].samples_of(0)):
        ids, learns = expected[sample.key]
        n = len(ids)
        assert llm.ids[at : at + n].tolist() == ids
        labels = [m if keep else -100 for m, keep in zip(ids[1:], learns[1:], strict=True)]
        assert llm.labels[at : at + n].tolist() == [*labels, -100]
        assert sample_length(sample, blueprint.inputs) == n and supervised_tokens(
            sample, blueprint.inputs
        ) == sum(learns)
        at += n
    depths = [int((row >= 0).sum()) for row in llm.ahead[1]] if llm.ahead else []
    assert depths == made.plan.table.mtp.sum(axis=1).tolist()  # what the plan counts is there
    virtual = prepare(0, index.samples, VirtualAssembler.of(assembler))
    assert virtual.micro[0].llm is not None and virtual.micro[0].llm.labels.shape == llm.labels.shape


def test_rows_of_a_conversation_enter_at_its_placeholder(
    tmp_path: Path, tokenizer: PublishedTokenizer
) -> None:
    """The plan's positions, which have no payload, are those of the placeholders that text is packed with."""
    parts = {f"a{i}.npy": npy(np.ones((n, 3))) for i, n in enumerate((5, 2))}
    content = [{"type": "audio", "audio": name, "module": "sensor"} for name in parts]
    chat = [{"role": "user", "content": [{"type": "text", "text": "hear"}, *content]}, *ANSWER[1:]]
    write_shard(tmp_path / "a.tar", [{"key": "k", "messages": chat, "parts": parts}])
    raw = small(data={"train": ["a.tar"], "tokenizer": str(tmp_path / "t")}, train={"global_batch": 1})
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "options": {"channels": 3}}
    raw["model"] = {"sensor": sensor, "llm": raw["model"]["llm"]}
    blueprint = draw_up(from_mapping(raw, tmp_path), 1)
    sample = open_index(blueprint, ["a.tar"], tmp_path).samples[0]
    axes = {"llm": Axes(), "sensor": Axes()}
    made = prepare(0, [sample], assembler_of(blueprint, RankInfo(0, 1, torch.device("cpu")), axes))
    llm = made.micro[0].llm
    assert llm is not None and not made.bad
    places = (llm.ids == tokenizer.placeholder_of("sensor")).nonzero().squeeze(1)
    text = len(tokenizer.encode("<|im_start|>user\nhear"))
    assert llm.row_positions["sensor"].tolist() == places.tolist() == [*range(text, text + len(places))]
    assert len(places) == sum(blueprint.inputs.rows("sensor", p) for p in sample.items("sensor"))


def expect(key: str, tokenizer: PublishedTokenizer) -> tuple[list[int], list[bool]]:
    if key == "plain":
        a, b = tokenizer.encode(TEXT), tokenizer.encode(" the dog")
        return [0, *a, *b, 1], [False] * (1 + len(a)) + [True] * (len(b) + 1)
    head = tokenizer.encode(f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    said, tail = tokenizer.encode("A boat.<|im_end|>"), tokenizer.encode("\n")
    if key == "odd":
        tail = tokenizer.encode("\n<|im_start|>user\n<image><|im_end|>\n")
    return head + said + tail, [False] * len(head) + [True] * len(said) + [False] * len(tail)


def test_truncation_is_to_the_token(tmp_path: Path, tokenizer: PublishedTokenizer) -> None:
    write_jsons(tmp_path / "a.tar", JSONS)
    lengths = {k: len(expect(k, tokenizer)[0]) for k in ("plain", "chat", "odd")}
    room = lengths["chat"] - 2
    blueprint = draw_up(config(tmp_path, max_skipped=1.0, overlong="truncate", context=room), 1)
    index: Index = select(
        load_index(["a.tar"], tmp_path, tokenizer=tokenizer), blueprint.inputs, blueprint.cfg.data
    )
    made = {s.key: s for s in index.usable}
    assert sample_length(made["chat"], blueprint.inputs) == room
    made_step = prepare(
        0, [made["chat"]] * 3, assembler_of(blueprint, RankInfo(0, 1, torch.device("cpu")), {"llm": Axes()})
    )
    llm = made_step.micro[0].llm
    assert llm is not None and not made_step.bad
    ids, learns = (part[:room] for part in expect("chat", tokenizer))
    assert llm.ids[:room].tolist() == ids
    assert np.flatnonzero(llm.labels[:room].numpy() >= 0).tolist() == [i - 1 for i in np.flatnonzero(learns)]


def test_a_chat_is_split_between_tokens(tmp_path: Path, tokenizer: PublishedTokenizer) -> None:
    write_jsons(tmp_path / "a.tar", {"chat": JSONS["chat"]})
    ids, learns = expect("chat", tokenizer)
    room = next(n for n in range(3, len(ids)) if any(learns[at] for at in range(n, len(ids), n)))
    blueprint = draw_up(config(tmp_path, overlong="split", context=room), 1)
    index = open_index(blueprint, ["a.tar"], tmp_path)
    assembler = assembler_of(blueprint, RankInfo(0, 1, torch.device("cpu")), {"llm": Axes()})
    found = {at: learns[at : at + room] for at in range(0, len(ids), room)}
    found = {at: own for at, own in found.items() if any(own[1:])}  # of the others nothing is learned
    assert [str(s.portion) for s in index.samples] == [f"{n + 1} of {len(found)}" for n in range(len(found))]
    for (at, own), sample in zip(found.items(), index.samples, strict=True):
        made = prepare(0, [sample], assembler)
        llm, n = made.micro[0].llm, len(own)
        assert llm is not None and not made.bad and made.plan.table.length.tolist() == [n]
        assert llm.ids[:n].tolist() == ids[at : at + n]
        labels = [t if keep else -100 for t, keep in zip(ids[at + 1 : at + n], own[1:], strict=True)]
        assert llm.labels[:n].tolist() == [*labels, -100]
        depths = [int((row >= 0).sum()) for row in llm.ahead[1]] if llm.ahead else []
        assert (made.plan.supervised, list(made.plan.mtp_supervised)) == (sum(own[1:]), depths)
    assembler.reader.close()


def test_all_chats_and_no_template(tmp_path: Path) -> None:
    write_jsons(tmp_path / "a.tar", {"chat": JSONS["chat"]})
    with pytest.raises(DataError, match=r"data.tokenizer=bytes has no chat template"):
        load_index(["a.tar"], tmp_path)
    bare = read_tokenizer(write_tokenizer(tmp_path / "v", byte_bpe()))
    with pytest.raises(DataError, match=r"has no chat template; needed: chat_template.jinja"):
        load_index(["a.tar"], tmp_path, tokenizer=bare)


def test_too_small_an_embedding_is_refused(tmp_path: Path, tokenizer: PublishedTokenizer) -> None:
    raw = small(data={"train": ["a.tar"], "tokenizer": str(tmp_path / "t")})
    raw["model"]["llm"]["vocab_size"] = tokenizer.needed - 1
    with pytest.raises(Refused, match=f"the tokenizer .*t needs at least {tokenizer.needed}"):
        draw_up(from_mapping(raw, tmp_path), 1)


def test_weights_of_another_vocabulary_are_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "weights", byte_bpe())
    raw = small(data={"train": ["a.tar"]}, checkpoint={"weights": str(folder)})

    def refuses(match: str, name: str = "bytes", **llm: Any) -> None:
        changed = {**raw, "data": {**raw["data"], "tokenizer": name}}
        changed["model"] = {"llm": {**raw["model"]["llm"], **llm}}
        with pytest.raises(Refused, match=match):
            check_start(from_mapping(changed, tmp_path))

    (folder / "config.json").write_text('{"vocab_size": 384}')
    refuses(r"data.tokenizer bytes has another vocabulary than the weights of .*weights: ")
    other = write_tokenizer(tmp_path / "other", unigram())
    refuses(
        r"another vocabulary than the weights .*tokens differ, such as .*needed: data.tokenizer=", str(other)
    )
    turned = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = turned["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    refuses(r"2 of 400 tokens differ, such as", str(tmp_path / "turned.json"))
    rows = read_tokenizer(folder).vocab_size
    refuses(f"embeds 384 tokens, model.llm.vocab_size is {rows + 128}", str(folder), vocab_size=rows + 128)
    more = byte_bpe()
    more.add_special_tokens(["<one more>"])  # which published ids do not see
    write_tokenizer(tmp_path / "more", more)
    raw["model"]["llm"]["vocab_size"] = 384 + 128
    (folder / "config.json").write_text('{"vocab_size": 512}')
    for fits in (folder, folder / "tokenizer.json", tmp_path / "more"):
        check_start(from_mapping({**raw, "data": {**raw["data"], "tokenizer": str(fits)}}, tmp_path))
    (folder / "config.json").write_text('{"vocab_size": 512, "image_token_id": 511}')
    refuses("image_token_id=511, beyond the vocabulary", str(folder))


def test_many_processes_encode_as_one_does(
    tmp_path: Path, tokenizer: PublishedTokenizer, monkeypatch: Any
) -> None:
    shards = [str(write_jsons(tmp_path / f"a-{k}.tar", JSONS)) for k in range(5)]
    indexes = kept_indexes(shards, write=False)

    def made() -> list[bytes]:
        found = tokens.kept_texts(shards, indexes, tokenizer, write=False)
        return [b"".join(content_of(join([k.table.take([k.shard])]))) for k in found]

    alone, seen, shard_of = made(), list[int](), tokens._shard
    monkeypatch.setattr("mm.data.tokens.ALONE", 0)
    monkeypatch.setattr("mm.data.forks.ALONE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(tokens, "_shard", lambda *args: (seen.append(1), shard_of(*args))[1])
    assert made() == alone and not seen  # other processes have made them


def test_a_process_that_dies_and_an_error_in_one_are_told() -> None:
    def work(task: range) -> int:
        if task.start == 3:
            raise DataError("odd")
        if task.start == 2:
            os._exit(1)
        return task.start

    tasks = [range(k, k + 1) for k in range(4)]
    with pytest.raises(DataError, match="a process that counts has ended"):
        list(in_forks(work, tasks, 2, "counts"))
    found = in_forks(work, [tasks[0], tasks[3], tasks[1]], 2, "counts")
    assert next(found) == 0
    with pytest.raises(DataError, match="odd"):
        next(found)
