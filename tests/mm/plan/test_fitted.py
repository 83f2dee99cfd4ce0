"""Samples by columns are what the definitions for one sample say: selected, cut, taken apart, planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning.synthetic import Sized
from mm.config.data import DataConfig
from mm.data.building import Kept
from mm.data.columns.entries import index_columns
from mm.data.columns.samples import Samples, Shard
from mm.data.sample import Index
from mm.data.tally import tally_of
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError
from mm.plan.fitted import Fitted
from mm.plan.inputs import EncoderUse, PlanInputs
from mm.plan.pieces import omissions, with_pieces
from mm.plan.select import select
from mm.plan.table import DataTable, SampleTable
from parallel.topology.layout import make_layout


class Tiled(Sized):
    """Items of several tiles have a text before each; those with "odd" do not fit."""

    @classmethod
    def pieces(cls, cfg: Any, meta: Mapping[str, int]) -> list[Any]:
        """A tag and a tile for each."""
        if meta["tiles"] == 1:
            return [meta]
        return [x for k in range(meta["tiles"]) for x in (f"<{k}>", {"rows": meta["rows"] + k, "tiles": 1})]

    @classmethod
    def rows(cls, cfg: Any, meta: Mapping[str, int]) -> int:
        """Rows of a tile."""
        if "odd" in meta:
            raise ValueError("it is odd")
        return meta["rows"]

    @classmethod
    def omits(cls, cfg: Any, meta: Mapping[str, int]) -> str:
        """Nothing of small ones."""
        return "much" if meta["rows"] > 4 else ""


LAYOUT = make_layout("llm", 1, {})
USES = {m: EncoderUse(Tiled, None, make_layout(m, 1, {})) for m in ("vision", "audio")}
META = st.fixed_dictionaries({"rows": st.integers(0, 6), "tiles": st.integers(1, 3)})
ODD = st.just({"rows": 1, "tiles": 1, "odd": 1})


@st.composite
def shard(draw: st.DrawFn) -> Any:
    """What a scan may have found."""
    samples = []
    for k in range(draw(st.integers(1, 5))):
        part = {"offset": 512, "size": 1}
        parts: dict[str, Any] = {"json": {**part, "sha256": f"{k:064x}", "meta": {}}}
        segments: list[dict[str, Any]] = []
        for n in range(draw(st.integers(0, 4))):
            if draw(st.booleans()):
                meta = draw(st.one_of(META, META, META, ODD))
                sha = f"{draw(st.integers(1, 3)):064x}"[::-1]
                parts[f"{n}.x"] = {**part, "sha256": sha, "meta": meta}
                segments.append({"kind": draw(st.sampled_from(list(USES))), "part": f"{n}.x"})
            else:
                loss = {} if draw(st.booleans()) else {"loss": False}
                size = draw(st.one_of(st.integers(0, 8), st.integers(0, 80)))
                segments.append({"kind": "text", "bytes": size, **loss})
        samples.append({"key": f"k{k}", "segments": segments, "parts": parts})
    rest = {"version": 3, "bytes": 0, "mtime_ns": 0, "probes": {}, "broken": [], "torn": False, "ignored": 0}
    return {**rest, "samples": samples, "headers": "00" * 32}


def both(found: list[Any], data: st.DataObject) -> tuple[Index, Index]:
    """The same samples in columns of one or two tables, and as objects."""
    apart, chatty = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    tables = [index_columns([(f"{k}.tar", own)]) for k, own in enumerate(found)] if apart else []
    table = index_columns([(f"{k}.tar", own) for k, own in enumerate(found)])
    for own in (*tables, table):  # a scan would have measured chats elsewhere
        chats = own.columns["samples"]["key_bytes"] * (own.columns["samples"]["parts"] + chatty) % 3 == 0
        own.columns["samples"]["chat"] = chats
    kept = [Kept(tables[k], 0) if apart else Kept(table, k) for k in range(len(found))]
    columns = Samples([Shard(f"{k}.tar", "ab"[k % 2], own, own) for k, own in enumerate(kept)])
    shards = tuple(f"{k}.tar" for k in range(len(found)))
    return Index(columns, (), shards), Index(tuple(columns), (), shards)


@settings(max_examples=80, deadline=None)
@given(found=st.lists(shard(), min_size=1, max_size=4), data=st.data())
def test_columns_are_selected_and_planned_as_samples_are(found: list[Any], data: st.DataObject) -> None:
    columns, objects = both(found, data)
    context = data.draw(st.integers(4, 30))
    made = PlanInputs(LAYOUT, USES, context=context, microbatches=1, mtp_depths=data.draw(st.integers(0, 3)))
    overlong = data.draw(st.sampled_from(["truncate", "skip", "split"]))
    rules = DataConfig(train=["any"], overlong=overlong, misfit="skip", max_skipped=1.0)
    if data.draw(st.booleans()):
        columns, objects = (with_pieces(i, made, Tokenizer()) for i in (columns, objects))
    got, wanted = (outcome(i, replace(made, _rows={}), rules) for i in (columns, objects))
    if isinstance(got, str) or isinstance(wanted, str):
        assert got == wanted
        return
    assert isinstance(got.samples, Fitted) and isinstance(wanted.samples, tuple)
    assert got.samples == wanted.samples and dict(got.skipped) == dict(wanted.skipped)
    assert got.usable == wanted.usable and (overlong == "split" or got.digest == wanted.digest)
    for a, b in zip(tally_of(got)[:4], tally_of(replace(wanted, tally=None))[:4], strict=True):
        assert a.tolist() == b.tolist()
    assert omissions(got, USES) == omissions(wanted, USES)
    good = [s.id for s in wanted.usable]
    which = np.asarray(data.draw(st.lists(st.sampled_from(good), max_size=6)), dtype=np.int64)
    mine = DataTable.of(got, made).take(which)
    theirs = SampleTable.of(wanted.samples, made, wanted.skipped).take(which)
    for name in ("ids", "length", "supervised", "mtp"):
        assert getattr(mine, name).tolist() == getattr(theirs, name).tolist(), name
    assert [mine.sources[k] for k in mine.source] == [theirs.sources[k] for k in theirs.source]
    for module in USES:
        a, b = mine.items[module], theirs.items[module]
        for name in ("of", "rows", "offset", "cost"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist(), name
        assert (a.content[:, None] == a.content).tolist() == (b.content[:, None] == b.content).tolist()
    assert [mine.sample(k) for k in range(len(which))] == [theirs.sample(k) for k in range(len(which))]


def outcome(index: Index, made: PlanInputs, rules: DataConfig) -> Index | str:
    """What is selected, or why nothing is."""
    try:
        return select(index, made, rules)
    except DataError as error:
        return str(error)
