"""Long samples in portions: every token once, in the order of the text, items whole, as if parted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.config.schema import from_mapping
from mm.data.inspect import count_lines
from mm.data.sample import Index, Part, Sample, Segment, grouped
from mm.errors import DataError
from mm.plan.batches import START, Batches
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.drawn import differences, history
from mm.plan.inputs import EncoderUse, PlanInputs, sample_length, supervised_tokens
from mm.plan.item_pieces import in_pieces
from mm.plan.phases import short_samples
from mm.plan.select import select
from mm.plan.table import DataTable
from mm.plan.truncate import spans, split_sample, truncated_sample
from mm.ranks.feed import prepare
from mm.ranks.job import assembler_of, open_index
from mm.ranks.launch import RankInfo
from mm.ranks.skipped import merged, written
from parallel.topology.axis import Axes
from parallel.topology.layout import make_layout
from tests.mm.harness import small, train_few
from tests.mm.plan.test_fitted import Tiled
from tests.mm.plan.test_select import picture, sample
from tests.mm.shards import write_shard

USES = {"vision": EncoderUse(Tiled, None, make_layout("vision", 1, {}))}
LAYOUT = make_layout("llm", 1, {})


@st.composite
def documents(draw: st.DrawFn) -> Sample:
    """Texts, learned or not, and pictures of one tile or several with texts between."""
    found = []
    for k in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            loss, depends = draw(st.booleans()), draw(st.sampled_from([None, "vision"]))
            found.append(Segment("text", draw(st.integers(0, 60)), None, loss, depends))
        else:
            meta = {"rows": draw(st.integers(0, 5)), "tiles": draw(st.integers(1, 2))}
            found.append(Segment("vision", 0, Part("s", f"{k}.png", k, 1, "", meta), True, None))
    made = Sample(0, "k", "s", tuple(found), Part("s", "json", 0, 1, "", {}), markers=draw(st.booleans()))
    return in_pieces(made, USES, lambda text: tuple(text.encode()))


def tokens(own: Sample, made: PlanInputs) -> list[tuple[int, int, bool]]:
    """By token of a sample's json, its text, its place there, and whether it has a label. Items as (-1, the
    offset of their payload)."""
    out, text = list[tuple[int, int, bool]](), 0 if own.portion is None else own.portion.texts
    for seg in own.segments:
        if seg.part is not None:
            out += [(-1, seg.part.offset, False)] * made.rows(seg.kind, seg.part)
        elif seg.ids is not None:
            out += [(-2, i, False) for i in seg.ids]
        else:
            out += [(text, seg.first + i, seg.loss) for i in range(seg.tokens)]
            text += 1
    if out and not own.markers:
        out[0] = (*out[0][:2], False)
    return out


@settings(max_examples=100, deadline=None)
@given(own=documents(), context=st.integers(12, 40))
def test_every_token_is_in_one_portion(own: Sample, context: int) -> None:
    made = PlanInputs(LAYOUT, USES, context=context, microbatches=1)
    whole, found = tokens(own, made), split_sample(own, made)
    sizes = [sum(len(tokens(replace(own, segments=(s,)), made)) for s in g) for g in grouped(own.segments)]
    items = [n for n, g in zip(sizes, grouped(own.segments), strict=True) if any(s.part for s in g)]
    if max(items, default=0) > context - 2 * own.markers:
        assert not found
        return
    portions = [tokens(one, made) for one in found]
    learned, inside = [t for t in whole if t[2]], [t for one in portions for t in one if t[2]]
    missing = [t for t in learned if t not in inside]
    assert inside == [t for t in learned if t in inside] and len(set(inside)) == len(inside)
    # Only in chats, the first token of a portion has no label.
    begins = {whole[span.start] for span in spans(own, made)[0] if span.start < len(whole)}
    assert set(missing) <= (set() if own.markers else begins)
    ends = [one.markers and not one.truncated for one in found]
    assert sum(ends) == own.markers and ends[-1:] == [own.markers] * bool(found)
    for n, (one, has) in enumerate(zip(found, portions, strict=True), 1):
        assert one.portion is not None and one.portion[:2] == (n, len(found))
        assert sample_length(one, made) == len(has) + 2 * own.markers <= context
        assert supervised_tokens(one, made) == sum(t[2] for t in has) + ends[n - 1] > 0
        kinds = {s.kind for s in one.segments}
        assert all(s.depends is None or s.depends in kinds for s in one.segments)
    # In order; of what is not there, nothing would be learned. A portion has all that there is room for.
    places = [t[:2] for one in portions for t in one]
    rest = iter(t[:2] for t in whole)
    assert all(t in rest for t in places)
    if len(places) == len(whole):
        for a, b in pairwise(found):
            left, group = context - sample_length(a, made), grouped(b.segments)[0]
            most = sum(len(tokens(replace(b, segments=(s,), portion=None), made)) for s in group)
            assert not left or (any(s.part for s in group) and most > left)
    for part in {t for t in places if t[0] == -1}:
        assert sum(any(t[:2] == part for t in one) for one in portions) == 1
        assert places.count(part) == [t[:2] for t in whole].count(part)
    first = truncated_sample(own, made)
    if len(found) > 1 and first is not None:
        assert [s.tokens for s in found[0].segments] == [s.tokens for s in first.segments]


LONG = [
    {
        "key": f"d{k}",
        "segments": [{"text": f"{k}." * (5 * k)}, {"text": "and" * (k % 3), "loss": k % 2 == 0}],
        "parts": {},
    }
    for k in range(12)
]


def opened(folder: Path, samples: Sequence[dict[str, Any]], **data: Any) -> tuple[Blueprint, Index]:
    write_shard(folder / "a.tar", list(samples))
    raw = small(
        data={"train": ["a.tar"], "context": 24, "overlong": "split", **data}, train={"global_batch": 4}
    )
    made = draw_up(from_mapping(raw, folder), 1)
    return made, open_index(made, made.cfg.data.train, folder)


def test_portions_are_samples_of_their_own_in_order_epochs_and_packing(tmp_path: Path) -> None:
    entries = [
        {"shards": "a.tar", "name": "a", "weight": 1, "split": [0, 0.7], "epochs": 2},
        {"shards": "a.tar", "name": "b", "weight": 2, "limit": 9},
    ]
    made, index = opened(tmp_path, LONG, train=entries, lengths=[{"until": 8, "longest": 20}])
    _, whole = opened(tmp_path, LONG, train=entries, overlong="skip", max_skipped=1, context=240)
    for ours, theirs in zip(index.selections, whole.selections, strict=True):
        keys = [whole.samples[i].key for i in theirs.ids]
        own = [index.samples[i] for i in ours.ids]
        assert list(dict.fromkeys(s.key for s in own)) == keys
        for key in keys:
            mine = [s.portion for s in own if s.key == key]
            assert mine == [None] or [p and p.nth for p in mine] == [*range(1, len(mine) + 1)]
    assert index.firsts == (0, len(index.samples) // 2, len(index.samples))
    assert [s.id for s in index.samples] == [*range(len(index.samples))]
    # Samples as objects are numbered and measured alike.
    plain = select(replace(whole, samples=tuple(whole.samples), skipped={}), made.inputs, made.cfg.data)
    assert plain.samples == index.samples and plain.firsts == index.firsts
    for ours, theirs in zip(index.selections, plain.selections, strict=True):
        assert ours[:3] == theirs[:3] and ours.ids.tolist() == theirs.ids.tolist()
    (short,) = short_samples(index, made.inputs, made.cfg.data.lengths)
    fits = [sample_length(index.samples[i], made.inputs) <= 20 for i in index.selections[1].ids]
    assert np.unpackbits(short[1], count=index.selections[1].size).tolist() == fits

    made, index = opened(tmp_path, LONG)
    count = len(index.samples)
    ids = np.concatenate([Batches.of(made.cfg, index).ids(step) for step in range(count)])
    assert all(sorted(e.tolist()) == [*range(count)] for e in ids.reshape(4, count))
    packed, index = opened(tmp_path, LONG, pack=30, window=count)
    table = DataTable.of(index, packed.inputs)
    batches = Batches.of(packed.cfg, index)
    window = np.concatenate([batches.sequences(step, table.take)[0] for step in range(count)])
    assert sorted(window[:count].tolist()) == [*range(count)]


def test_another_context_is_another_run_and_counts_say_what_is_split(tmp_path: Path) -> None:
    made, index = opened(tmp_path, LONG)
    old = history(made.cfg, index, 1, START)
    split = [s for s in index.samples if s.portion is not None]
    said = f"{len({s.key for s in split})} split into {len(split)} portions"
    assert said in count_lines("training", index)[1]
    made, index = opened(tmp_path, LONG)
    assert not differences(old, history(made.cfg, index, 1, START))
    # With another context the portions are as many, and not the same.
    pasts = []
    for context in (24, 23):
        made, index = opened(tmp_path, LONG[3:4], context=context)
        assert [s.portion and str(s.portion) for s in index.samples] == ["1 of 2", "2 of 2"]
        pasts.append(history(made.cfg, index, 1, START))
    assert differences(*pasts) == ["data.train had other samples or epochs"]


def test_portions_of_a_large_data_set_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.plan.measured.LARGE", 0)
    first = opened(tmp_path, LONG)[1]
    with monkeypatch.context() as patch:
        patch.setattr("mm.plan.select._measure", None)
        again = opened(tmp_path, LONG)[1]
    assert again.samples == first.samples and again.usable == first.usable
    assert count_lines("training", again) == count_lines("training", first)
    assert len(opened(tmp_path, LONG, overlong="truncate")[1].samples) == len(LONG)
    assert len(list(tmp_path.glob("shards-*.selection"))) == 2


def test_an_item_that_no_portion_has_room_for_is_named(tmp_path: Path) -> None:
    large = sample("large", "x" * 30, (8, 8), (16, 16))
    with pytest.raises(
        DataError, match=r"sample large of .* has an item of 16 tokens, a portion has room for 14"
    ):
        opened(tmp_path, [*LONG, large], context=16)
    _, index = opened(tmp_path, [*LONG[:3], large, *LONG[3:]], context=16, max_skipped=0.1)
    (number,) = index.skipped
    assert index.samples[number].key == "large" and number not in index.usable.ids
    assert {s.key for s in index.usable} == {s["key"] for s in LONG}


def test_the_tensors_of_portions_are_the_sample(tmp_path: Path) -> None:
    own = sample("s", "abcdefgh" * 3, (8, 8))
    own["segments"] += [{"text": "read" * 4, "loss": False}, {"text": "x" * 41, "depends": "vision"}]
    made, index = opened(tmp_path, [own], context=14)
    assembler = assembler_of(made, RankInfo(0, 1, torch.device("cpu")), {m: Axes() for m in made.layouts})
    ids, labels = list[int](), list[int]()
    for n, one in enumerate(index.samples):
        prepared = prepare(0, [one], assembler)
        llm = prepared.micro[0].llm
        assert llm is not None and not prepared.bad
        length = prepared.plan.table.length[0]
        assert prepared.plan.supervised == int((llm.labels >= 0).sum())
        ids += llm.ids[1 : length - 1].tolist()
        labels += llm.labels[: length - 1 if n + 1 < len(index.samples) else length].tolist()
        assert llm.ids[0] == assembler.tokenizer.bos and llm.ids[length - 1] == assembler.tokenizer.eos
        assert n < 3 or not prepared.micro[0].depends["vision"].any()  # the picture is in another portion
    assert bytes(i for i in ids if i < 256).decode() == "abcdefgh" * 3 + "read" * 4 + "x" * 41
    assert bytes(i for i in labels if 0 <= i < 256).decode() == "abcdefgh" * 3 + "x" * 41
    assert labels.count(assembler.tokenizer.eos) == 1
    assembler.reader.close()


def test_a_portion_that_cannot_be_read_is_named_and_moves_no_other(tmp_path: Path) -> None:
    own = sample("s", "x" * 30, (8, 8))
    own["segments"].append({"vision": "late.png"})
    own["parts"]["late.png"] = picture(8, 12)
    made, index = opened(tmp_path, [own, *LONG[:4]])
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(raw.replace(picture(8, 12), bytes(len(picture(8, 12)))))
    assembler = assembler_of(made, RankInfo(0, 1, torch.device("cpu")), {m: Axes() for m in made.layouts})
    bad = [b for one in index.samples for b in prepare(0, [one], assembler).bad]
    assembler.reader.close()
    (skip,) = merged([written(bad)])
    assert (skip.sample_id, skip.key, skip.portion) == (1, "s", "2 of 2")
    assert str(skip).startswith("sample s (portion 2 of 2) of ") and "late.png" in skip.why


WORDS = ["".join(chr(97 + (7 * k + i * i) % 26) for i in range(11 * k + 3)) for k in range(6)]
LONGER = [sample(f"d{k}", words, *[(8, 8)] * (k % 3)) for k, words in enumerate(WORDS)]


def by_hand() -> list[dict[str, Any]]:
    """LONGER as it is split into portions of 36 tokens: what follows each place, which truncation ends."""
    out = []
    for own in LONGER:
        (words,) = (s["text"] for s in own["segments"] if "text" in s)
        pictures = [s for s in own["segments"] if "vision" in s]
        room, at = 34 - 4 * len(pictures), 0
        while at < len(words):
            segments = [*(pictures if at == 0 else []), {"text": words[at:]}]
            out.append(
                {"key": f"{own['key']}-{at}", "segments": segments, "parts": own["parts"] if at == 0 else {}}
            )
            at, room = at + room, 34
    return out


def few(folder: Path, samples: Sequence[dict[str, Any]], overlong: str, **layout: Any) -> dict[str, Any]:
    """The config of a job on pictures and long texts, with predictions further ahead than the next token."""
    folder.mkdir(exist_ok=True)
    shard = write_shard(folder / "a.tar", list(samples))
    data = {"train": [str(shard)], "context": 36, "overlong": overlong}
    raw = small(data=data, train={"global_batch": 6}, layout=layout)
    del raw["model"]["audio"]
    raw["model"]["llm"] |= {"mtp_layers": 1, "mtp_pattern": "*", "pattern": "*-"}
    return raw


def test_a_job_learns_from_portions_what_it_learns_from_samples_parted_by_hand(
    tmp_path: Path, alone: Any
) -> None:
    split = alone(1, train_few, few(tmp_path / "split", LONGER, "split"), 2)[0]
    hand = alone(1, train_few, few(tmp_path / "hand", by_hand(), "truncate"), 2)[0]
    for name in ("loss", "tokens", "grad_norm"):
        assert [s[name] for s in split] == [s[name] for s in hand]


@pytest.mark.slow  # any layout learns alike from samples, and these are such
def test_portions_are_learned_alike_in_any_layout(tmp_path: Path, ranks: Any) -> None:
    one = ranks(1, train_few, few(tmp_path, LONGER, "split"), 3)[0]
    layout = {"vision": {"tp": 2, "ranks": "2-3"}, "llm": {"pp": 2, "cp": 2}}
    wide = ranks(4, train_few, few(tmp_path, LONGER, "split", **layout), 3)[0]
    assert [s["loss"] for s in wide] == pytest.approx([s["loss"] for s in one], rel=1e-9)
