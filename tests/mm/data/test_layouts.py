"""Layouts of samples that people have: what is made of them, read from a tar as it is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.commands.preflight import check_paths
from mm.config.schema import from_mapping
from mm.data.convert.run import Request, convert
from mm.data.encode import parse_made, parse_sample
from mm.data.index import load_index
from mm.data.layouts.conversations import as_segments, conversations
from mm.data.layouts.find import find_layout, layout_name
from mm.data.layouts.interleaved import interleaved
from mm.data.layouts.tar import made_of, text_part
from mm.data.order import permute_items
from mm.data.reader import ShardReader
from mm.data.scan import build_index
from mm.data.storage import Storage
from mm.errors import DataError, Refused
from mm.plan.blueprint import draw_up
from mm.ranks.feed import prepare
from mm.ranks.job import assembler_of, open_index
from mm.ranks.launch import RankInfo
from parallel.topology.axis import Axes
from tests.mm.data.test_damage import write_tar
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, write_tokenizer
from tests.mm.harness import small
from tests.slow import on_demand


def picture(shade: int = 0, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), shade).save(buffer, form)
    return buffer.getvalue()


def lines(*said: str) -> None: ...


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(said)]


CONVERSATION = {"conversations": turns("<image>\nWhat is it?", "A boat."), "image": "coco/1.png"}
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}],
    },
    {"role": "assistant", "content": "A boat."},
]
WRITTEN: dict[str, tuple[dict[str, bytes], str, dict[str, Any]]] = {  # parts, layout, what is made of them
    "captions": (
        {"jpg": picture(form="JPEG"), "txt": b"a boat"},
        "captions",
        {"segments": [{"vision": "jpg"}, {"text": "a boat", "depends": "vision"}]},
    ),
    "img2dataset": (
        {"jpg": picture(form="JPEG"), "json": b'{"caption": "a", "width": 8}', "txt": b"a boat"},
        "captions",
        {"segments": [{"vision": "jpg"}, {"text": "a boat", "depends": "vision"}]},
    ),
    "caption in json": (
        {"png": picture(), "json": b'{"caption": "a boat", "url": "x"}'},
        "captions",
        {"segments": [{"vision": "png"}, {"text": "a boat", "depends": "vision"}]},
    ),
    "conversation": (
        {"png": picture(), "json": json.dumps(CONVERSATION).encode()},
        "conversations",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "png"}, MESSAGES[0]["content"][1]]},
                MESSAGES[1],
            ],
            "depends": "vision",
        },
    ),
    "document": (
        {"img2.png": picture(2), "img10.png": picture(3),
         "json": b'{"texts": ["a", null, "b", null], "images": [null, "u/x", null, "u/y"]}'},
        "interleaved",
        {"segments": [{"text": "a"}, {"vision": "img2.png"}, {"text": "b"}, {"vision": "img10.png"}]},
    ),
    "text": ({"txt": "naïve\n".encode()}, "text", {"segments": [{"text": "naïve\n"}]}),
    "segments": (
        {"png": picture(), "json": b'{"segments": [{"vision": "png"}, {"text": "x"}]}'},
        "segments",
        {"segments": [{"vision": "png"}, {"text": "x"}]},
    ),
    "messages": (
        {"a.png": picture(), "json": json.dumps({"messages": MESSAGES}).encode()},
        "segments",
        {"messages": MESSAGES},
    ),
}  # fmt: skip


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    return write_tar(
        path, {f"{key}.{part}": p for key, parts in samples.items() for part, p in parts.items()}
    )


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_tar_is_read_as_it_is(kind: str, tmp_path: Path) -> None:
    """What the index says, and what its text part reads as by that, are what the layout makes of it all."""
    parts, layout, made = WRITTEN[kind]
    shard = write(tmp_path / "a.tar", {"k": parts})
    entry = build_index(shard)["samples"][0]
    part = entry.get("text", "json")
    assert entry.get("layout", "segments") == layout
    names = [s["part"] for s in entry["segments"] if "part" in s]
    assert names == [n for n in parts if f'"{n}"' in json.dumps(made)]
    assert made_of(parts[part], part, layout, parts) == made
    assert parse_sample(parts[part], layout, part, names) == parse_made(made)


def test_a_shard_has_one_layout(tmp_path: Path) -> None:
    """What most samples look like: a caption that has lost its picture does not become a text."""
    own = WRITTEN["captions"][0]
    lost = {"a": own, "b": {"txt": b"of what?"}, "c": {"jpg": own["jpg"]}, "d": own}
    write(tmp_path / "a.tar", lost)
    write(tmp_path / "b.tar", {"k": WRITTEN["document"][0]})
    index = load_index(["a.tar", "b.tar"], tmp_path)
    assert [(s.key, s.layout) for s in index.samples] == [
        ("a", "captions"),
        ("d", "captions"),
        ("k", "interleaved"),
    ]
    assert [(b.key, b.why[:30]) for b in index.broken] == [
        ("b", "it has a caption of nothing: n"),
        ("c", "it has no txt or text or capti"),
    ]
    reader = ShardReader()
    for sample in index.samples:
        payload = reader.read(sample, sample.json)
        written = parse_sample(payload, sample.layout, sample.json.name, sample.names)
        assert [s.tokens for s in sample.segments] == [len((s.text or "").encode()) for s in written]


def test_a_layout_of_the_config_makes_another_index(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"k": WRITTEN["captions"][0]})
    one = load_index(["a.tar"], tmp_path)
    other = {"segments": [{"literal": "It is: ", "loss": False}, {"text": "txt"}]}
    index = load_index(["a.tar"], tmp_path, layout=other)
    assert [s.tokens for s in index.samples[0].segments] == [7, 6] and index.samples[0].names == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm.data.building.build_index", None)
        assert load_index(["a.tar"], tmp_path, layout=other, storage=Storage(say=str)) == index
    assert load_index(["a.tar"], tmp_path, layout="captions", storage=Storage(say=str)) == one
    assert load_index(["a.tar"], tmp_path, storage=Storage(say=str)) == one


NAMED = st.lists(st.sampled_from(["1.jpg", "2.jpg", "10.jpg", "a.wav", "cls", "npy", "txt"]), unique=True)


@settings(max_examples=15, deadline=None)
@given(NAMED, st.randoms(use_true_random=False))
def test_what_is_made_depends_on_no_order_and_no_name_that_is_not_used(names: list[str], rng: Any) -> None:
    """Training knows only the names of items, in the order that indexing gave them."""
    records: dict[str, Any] = {
        "captions": {"text": "a"},
        "conversations": {"conversations": turns("a", "b")},
        "text": {"text": "a"},
    }
    for layout, record in records.items():
        try:
            made = find_layout(layout).make(record, names)
        except ValueError:
            continue
        found = [n for n in names if f'"{n}"' in json.dumps(made) and n != "txt"]
        rng.shuffle(found)
        assert find_layout(layout).make(record, found) == made


def parts_of(record: Any) -> list[Any]:
    return [m["content"] for m in conversations(record, ())["messages"]]


def test_turns_and_placeholders() -> None:
    said = turns("a <image>\n\nb<video>", "c", "d", "e")
    made = conversations({"conversations": said, "image": "x", "video": "y"}, ())
    assert made["messages"][0]["content"] == [
        {"type": "text", "text": "a "},
        {"type": "image", "image": "x"},
        {"type": "text", "text": "b"},
        {"type": "video", "video": "y"},
    ]
    assert [m["role"] for m in made["messages"]] == ["user", "assistant"] * 2 and made["depends"] == "vision"
    openai = {"messages": [{"role": "user", "content": "<image>a"}], "images": ["x"]}
    assert parts_of(openai) == [[{"type": "image", "image": "x"}, {"type": "text", "text": "a"}]]
    sound = parts_of({"conversations": turns("a", "b"), "audio": "x.wav"})
    assert sound[0] == [{"type": "audio", "audio": "x.wav"}, {"type": "text", "text": "a"}]
    video = parts_of({"conversations": turns("<image>\na", "b"), "video": "x.mp4"})
    assert video[0][0] == {"type": "video", "video": "x.mp4"}
    content = [{"type": "text", "text": "a", "index": None}, {"type": "image", "text": None, "index": 0}]
    vsft = {"messages": [{"role": "user", "content": content}], "images": ["p"]}
    assert parts_of(vsft)[0] == [{"type": "text", "text": "a"}, {"type": "image", "image": "p"}]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"conversations": turns("<image>a", "b")}, "placeholders for 1 of kind image, and it has no media"),
        (
            {"conversations": turns("a <audio>", "b"), "image": "x"},
            "1 of kind audio, and it has 1 of kind image",
        ),
        ({"conversations": turns("<image>", "b"), "image": ["x", "y"]}, "2 of kind image"),
        ({"conversations": ["a"]}, "turn 0 is 'a'"),
        ({"conversations": [{"from": "human"}]}, "turn 0"),
        ({"text": "a"}, "no list of turns"),
    ],
)
def test_a_conversation_that_is_none_is_refused(record: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        conversations(record, ())


def test_a_conversation_as_segments() -> None:
    made = as_segments(conversations({**CONVERSATION, "image": "x"}, ()))
    assert "".join(s.get("text", "<image>") for s in made["segments"]) == (
        "user: <image>What is it?\nassistant: A boat.\n"
    )
    assert [s["text"] for s in made["segments"] if s.get("loss", True) and "text" in s] == ["A boat.", "\n"]
    assert [s["depends"] for s in made["segments"] if "depends" in s] == ["vision"]


def test_documents_of_mmc4() -> None:
    info = [{"image_name": "b", "matched_text_index": 1}, {"image_name": "a", "matched_text_index": 1}]
    made = interleaved({"text_list": ["x", "y"], "image_info": info}, ())
    assert made == {"segments": [{"text": "x"}, {"vision": "b"}, {"vision": "a"}, {"text": "y"}]}
    for texts, images in ((["a"], []), (["a"], ["x"]), ([None], [None])):
        with pytest.raises(ValueError):
            interleaved({"texts": texts, "images": images}, ())


def test_a_mapping_of_fields() -> None:
    record = {"meta": {"caption": "a boat", "answers": ["yes", "no"]}, "photo": "x.jpg", "n": 3}
    entries = [
        {"vision": "jpg;photo"},
        {"text": "meta.answers[1]", "depends": "vision"},
        {"literal": "!", "loss": False},
        {"text": "n"},
    ]
    assert find_layout(layout_name({"segments": entries})).make(record, ())["segments"] == [
        {"vision": "x.jpg"},
        {"text": "no", "depends": "vision"},
        {"text": "!", "loss": False},
        {"text": "3"},
    ]
    asked = {
        "messages": [{"user": [{"image": "photo"}, {"literal": "What?"}]}, {"assistant": "meta.caption"}]
    }
    assert find_layout(layout_name(asked)).make(record, ())["messages"] == [
        {"role": "user", "content": [{"type": "image", "image": "x.jpg"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a boat"},
    ]
    renamed = {"layout": "conversations", "fields": {"conversations": "dialog"}, "plain": True}
    made = find_layout(layout_name(renamed)).make({"dialog": turns("a", "b")}, ())
    assert [s["text"] for s in made["segments"]] == ["user: ", "a", "\n", "assistant: ", "b", "\n"]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("capions", "there is no layout 'capions'; nearest: captions"),
        ({"segment": []}, "no key 'segment'; nearest: segments"),
        ({}, "none of layout, segments, messages"),
        ({"segments": [{"text": "a", "vision": "b"}]}, "needed: one of text, literal or a module"),
        ({"messages": [{"user": [{"picture": "a"}]}]}, "needed: a role with a field"),
        ({"layout": "text", "plain": 1}, "needed: true or false"),
        ("no.such:thing", "cannot be imported"),
        ("json:__name__", "needed: a function"),
    ],
)
def test_a_layout_that_is_none_is_refused(spec: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        layout_name(spec)
    write(tmp_path / "a.tar", {"k": WRITTEN["text"][0]})
    with pytest.raises(DataError, match=why):
        load_index(["a.tar"], tmp_path, layout=spec)


def test_a_wrong_layout_or_file_is_refused_before_ranks_start(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"k": WRITTEN["text"][0]})
    raw = small(data={"train": ["a.tar"], "layout": "capions"}, run={"dir": str(tmp_path / "run")})
    with pytest.raises(Refused, match="there is no layout 'capions'; nearest: captions"):
        check_paths(from_mapping(raw, tmp_path), write=False)
    (tmp_path / "b.jsonl").write_text("{}")
    for pattern, why in (("b.jsonl", "b.jsonl is no tar; needed: shards; python -m mm data convert"),
                         ("none/*.tar", "the folder does not exist")):  # fmt: skip
        raw["data"] |= {"train": [pattern], "layout": None}
        with pytest.raises(DataError, match=why):
            check_paths(from_mapping(raw, tmp_path), write=False)


def shouting(record: Any, names: Any) -> Any:
    return {"segments": [{"text": record["txt"].upper()}]}


def test_a_function_of_the_users(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"k": {"txt": b"a boat"}})
    name = f"{__name__}:shouting"
    entry = build_index(shard, name)["samples"][0]
    assert entry["layout"] == name and entry["segments"] == [{"kind": "text", "bytes": 6}]
    assert parse_sample(b"a boat", name, "txt", ())[0].text == "A BOAT"  # type: ignore[index]
    assert find_layout(name).key != name


def test_what_is_wrong_with_a_sample_is_said() -> None:
    with pytest.raises(ValueError, match=r"no json part \(layout conversations\), only jpg"):
        text_part(["jpg"], "conversations")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        made_of(b"\xff", "txt", "captions", ["jpg"])
    with pytest.raises(ValueError, match="no text, only jpg, a, json; needed"):
        made_of(b'{"a": 1}', "json", "captions", ["jpg"])


def step_of(tmp_path: Path, pattern: str, tokenizer: str, **rules: Any) -> list[torch.Tensor]:
    """Ids, labels and places of rows of one step over all samples, and over the same with items exchanged."""
    raw = small(data={"train": [pattern], "tokenizer": tokenizer, "context": 200, **rules})
    raw["model"] = {m: raw["model"][m] for m in ("vision", "llm")}
    blueprint = draw_up(from_mapping(raw, tmp_path), 1)
    samples = list(open_index(blueprint, [pattern], tmp_path).samples)
    rank = RankInfo(0, 1, torch.device("cpu"))
    assembler = assembler_of(blueprint, rank, {"llm": Axes(), "vision": Axes()})
    out = []
    for some in (samples, permute_items(samples, "vision", 0)):
        made = prepare(0, some, assembler)
        assert not made.bad
        for micro in made.micro:
            assert micro.llm is not None
            out += [micro.llm.ids, micro.llm.labels, micro.llm.row_positions["vision"]]
    return out


@pytest.mark.parametrize(
    "kind",
    on_demand(
        ["captions", "truncated", "conversations", "interleaved", "mapping"],
        ["captions", "conversations", "interleaved", "mapping"],
    ),
)
def test_a_step_of_a_tar_as_it_is_equals_that_of_its_conversion(kind: str, tmp_path: Path) -> None:
    tokenizer, layout, rules = "bytes", kind, {}
    if kind in ("conversations", "truncated"):
        folder = write_tokenizer(tmp_path / "t", byte_bpe(), template=CHATML)
        tokenizer, layout = str(folder), "conversations"
        rules = {"context": 40, "overlong": "truncate"} if kind == "truncated" else {}
    if kind == "mapping":
        layout = json.dumps({"segments": [{"vision": "png"}, {"text": "json.a", "depends": "vision"}]})
    samples = {}
    for k in range(4):
        said = turns(f"<image>\nWhat is it, number {k}?", "A boat" + k * ", a boat")
        json_of = {
            "captions": {"caption": "a boat" * (k + 1)},
            "conversations": {"conversations": said, "image": "x"},
            "interleaved": {"texts": [f"{k}", None, "end"], "images": [None, "x", None]},
            "mapping": {"a": f"boat {k}"},
        }[kind.replace("truncated", "conversations")]
        samples[f"k{k}"] = {"png": picture(60 * k), "json": json.dumps(json_of).encode()}
    write(tmp_path / "a.tar", samples)
    spec = json.loads(layout) if kind == "mapping" else layout
    convert(Request((str(tmp_path / "a.tar"),), tmp_path / "o", spec), 1, lambda line: None)
    as_it_is = step_of(tmp_path, "a.tar", tokenizer, layout=spec, **rules)
    converted = step_of(tmp_path, "o/*.tar", tokenizer, **rules)
    assert len(as_it_is) == len(converted) > 0
    assert all(torch.equal(a, b) for a, b in zip(as_it_is, converted, strict=True))
    assert (as_it_is[1] >= 0).any()
