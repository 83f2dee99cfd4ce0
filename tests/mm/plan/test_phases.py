"""A curriculum by length draws short samples first, each once an epoch of its phase."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.config.schema import Config, from_mapping
from mm.config.sources import LengthsConfig
from mm.data.sample import Index
from mm.errors import DataError, Refused
from mm.order.chosen import Chosen, Range
from mm.order.stream import Source, Stream
from mm.plan.batches import START, Batches
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.drawn import differences, history
from mm.plan.inputs import sample_length
from mm.plan.phases import in_phases, short_samples
from mm.plan.table import SampleTable
from mm.ranks.job import open_index
from mm.report.header import source_lines
from tests.mm.harness import small
from tests.mm.plan.test_select import ODD, sample
from tests.mm.shards import write_shard

ENTRIES = [LengthsConfig(until=40, longest=3), LengthsConfig(until=130, longest=6)]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_each_phase_takes_its_short_samples_once_an_epoch(data: st.DataObject, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(2, 30), min_size=1, max_size=3))
    lengths = np.asarray(data.draw(st.lists(st.integers(1, 9), min_size=sum(sizes), max_size=sum(sizes))))
    bounds = [0, *np.cumsum(sizes).tolist()]
    two = [*bounds[:-1], *(b + 1 for b in bounds[:-1])]
    lengths[two] = 1  # each source has two short samples
    kept = np.asarray(data.draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes))))
    kept[two] = True
    ranges = [Range(a, b - a, np.packbits(kept[a:b])) for a, b in pairwise(bounds)]
    if data.draw(st.booleans()):  # one source of several ranges
        sources, weights = [Source("", Chosen.of(ranges))], {0: [1.0]}
    else:
        sources = [Source(f"s{k}", Chosen.of([r])) for k, r in enumerate(ranges)]
        some = st.lists(st.integers(1, 4).map(float), min_size=len(sizes), max_size=len(sizes))
        weights = {p: data.draw(some) for p in data.draw(st.sets(st.integers(1, 300), max_size=2)) | {0}}
    short = [[np.packbits(lengths[a:b] <= e.longest) for a, b in pairwise(bounds)] for e in ENTRIES]
    stream = Stream.of(seed, *in_phases(sources, weights, ENTRIES, short))
    ids, which = stream.at(np.arange(400))
    for start, stop, longest in ((0, 40, 3), (40, 130, 6), (130, 400, 9)):
        for k, source in enumerate(sources):
            every = np.concatenate(
                [r.first + np.flatnonzero(kept[r.first :][: r.size]) for r in source.samples.ranges]
            )
            may = sorted(every[lengths[every] <= longest].tolist())
            own = ids[start:stop][which[start:stop] % len(sources) == k].tolist()
            for at in range(0, len(own) - len(may) + 1, len(may)):
                assert sorted(own[at : at + len(may)]) == may
            assert set(own) <= set(may)
        # The sources have the shares of the weights that hold, as without phases.
        plain = np.bincount(
            Stream.of(seed, sources, weights).at(np.arange(start, stop))[1], minlength=len(sources)
        )
        taken = np.bincount(which[start:stop] % len(sources), minlength=len(sources))
        assert np.abs(plain - taken).max() < 2 * (1 + sum(start < p < stop for p in weights))
    # An unreadable sample is replaced by one that is as short.
    mended = stream.mended(np.arange(400), ids, which, ids[:1])
    assert (lengths[mended[:40]] <= 3).all() and (lengths[mended[40:130]] <= 6).all()
    assert not (mended == ids[0]).any() and (mended == ids)[ids != ids[0]].all()


def opened(
    folder: Path, lengths: list[Any], train: list[Any] | None = None, **data: Any
) -> tuple[Blueprint, Index]:
    # 2 markers, 4 rows of a picture, a token a byte: 7 to 16 tokens
    for name in "ab":
        if not (folder / f"{name}.tar").exists():
            made = [sample(f"{name}{k:02d}", "x" * (k % 10 + 1), (8, 8)) for k in range(40)]
            write_shard(folder / f"{name}.tar", made)
    raw = small(
        data={"train": train or ["*.tar"], "context": 20, "lengths": lengths, **data},
        train={"global_batch": 4, "steps": 10},
    )
    blueprint = draw_up(from_mapping(raw, folder), 1)
    return blueprint, open_index(blueprint, blueprint.cfg.data.train, folder)


CURRICULUM = [{"until": 16, "longest": 8}, {"until": 32, "longest": 12}]


def test_a_run_begins_with_short_samples(tmp_path: Path) -> None:
    made, index = opened(tmp_path, CURRICULUM)
    batches = Batches.of(made.cfg, index)
    ids = np.concatenate([batches.ids(step) for step in range(28)])
    length = SampleTable.of(index.samples, made.inputs).length
    assert sorted(ids[:16].tolist()) == np.flatnonzero(length <= 8).tolist()
    assert length[ids[16:32]].max() <= 12 and len(set(ids[16:32].tolist())) == 16
    assert Counter(ids[32:].tolist()) == Counter(range(80))
    said = source_lines(made, index)
    assert said[:2] == [
        "source    up to 8 tokens: 16 samples, without end",
        "source    up to 12 tokens, from sample 16 on: 48 samples, without end",
    ]
    # Sources keep their shares, split and limit; samples as objects are measured alike.
    train = [
        {"shards": "a.tar", "weight": 3, "limit": 20},
        {"shards": "b.tar", "weight": 1, "split": [0, 0.8]},
    ]
    made, index = opened(tmp_path, CURRICULUM, train)
    ids = np.concatenate([Batches.of(made.cfg, index).ids(step) for step in range(8)])
    assert (np.bincount(ids // 40).tolist()) == [24, 8] and set(ids.tolist()) <= {s.id for s in index.usable}
    assert length[ids[:16]].max() <= 8 and length[ids].max() <= 12
    plain = replace(index, samples=tuple(index.samples))
    ours, theirs = (short_samples(i, made.inputs, made.cfg.data.lengths) for i in (index, plain))
    assert all(
        np.array_equal(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_lengths_are_those_of_truncated_samples_and_none_is_left_out(tmp_path: Path) -> None:
    made, index = opened(tmp_path, [{"until": 8, "longest": 13}], context=14, overlong="truncate")
    (own,) = short_samples(index, made.inputs, made.cfg.data.lengths)
    fits = [sample_length(s, made.inputs) <= 13 for s in index.samples]
    assert np.unpackbits(own[0], count=80).tolist() == fits and sum(fits) == 56
    write_shard(tmp_path / "c.tar", [ODD])
    rules: dict[str, Any] = {"context": 14, "overlong": "skip", "misfit": "skip", "max_skipped": 1}
    made, index = opened(tmp_path, [{"until": 8, "longest": 13}], **rules)
    (own,) = short_samples(index, made.inputs, made.cfg.data.lengths)
    assert np.unpackbits(own[0], count=81).tolist() == [*fits, False] and 80 in index.skipped


def test_packing_takes_the_same_samples(tmp_path: Path) -> None:
    made, index = opened(tmp_path, CURRICULUM, pack=40, window=16)
    table, batches = SampleTable.of(index.samples, made.inputs), Batches.of(made.cfg, index)
    found = [batches.sequences(step, table.take)[0] for step in range(12)]
    ids = np.concatenate(found)
    assert sorted(ids[:16].tolist()) == np.flatnonzero(table.length <= 8).tolist()
    assert len(set(ids[16:32].tolist())) == 16 and table.length[ids[16:32]].max() <= 12


def test_a_run_goes_on_where_only_later_phases_change(tmp_path: Path) -> None:
    def past(lengths: list[Any], step: int) -> tuple[dict[str, Any], Config]:
        made, index = opened(tmp_path, lengths)
        return history(made.cfg, index, step, START), made.cfg

    old, _ = past(CURRICULUM, 3)
    assert not differences(old, past([{"until": 20, "longest": 8}], 3)[0])
    assert differences(old, past([{"until": 16, "longest": 9}], 3)[0]) == [
        "source up to 8 tokens was there",
        "source up to 9 tokens was not there",
    ]
    assert differences(past(CURRICULUM, 5)[0], past([{"until": 20, "longest": 8}], 5)[0])


@pytest.mark.parametrize(
    "lengths, said",
    [
        ([{"until": 9, "longest": 8}, {"until": 9, "longest": 12}], r"until \[9, 9\]; needed: rising"),
        ([{"until": 9, "longest": 8}, {"until": 10, "longest": 7}], r"longest \[8, 7\]; needed: rising"),
        ([{"until": 9, "longest": 20}], "longest is 20, but no sample is longer than data.context, 20"),
        ([{"until": 0, "longest": 8}], "data.lengths.0.until: given 0"),
        ([{"sample": 1, "longest": 8}], "unknown key data.lengths.0.sample"),
    ],
)
def test_curricula_that_cannot_be_are_refused(tmp_path: Path, lengths: list[Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        opened(tmp_path, lengths)


def test_a_phase_without_a_sample_is_refused(tmp_path: Path) -> None:
    made, index = opened(tmp_path, [{"until": 8, "longest": 6}])
    with pytest.raises(DataError, match=r"source of data.train has no sample of at most 6 tokens"):
        Batches.of(made.cfg, index)
    write_shard(tmp_path / "c.tar", [sample("c", "x" * 9, (8, 8))])
    train = [{"shards": "a.tar", "weight": 1, "name": "a"}, {"shards": "c.tar", "weight": 0, "name": "c"}]
    late = [{"sample": 8, "weights": {"c": 1}}]
    made, index = opened(tmp_path, [{"until": 8, "longest": 8}], train, weights=late)
    assert Batches.of(made.cfg, index).ids(2).tolist() == [40] * 4  # without a weight it need not have one
    made, index = opened(tmp_path, [{"until": 9, "longest": 8}], train, weights=late)
    with pytest.raises(DataError, match=r"source c has no sample of .* at sample 8 of the run"):
        Batches.of(made.cfg, index)
