"""Data sets told from the paths of their shards."""

from __future__ import annotations

from pathlib import PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.data.sources import MOST, OTHERS, source_names


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (["a/train-000000.tar", "a/train-000001.tar"], ["train", "train"]),
        (
            ["coco/train-0.tar", "sound/train-0.tar", "coco/train-1.tar"],
            ["coco/train", "sound/train", "coco/train"],
        ),
        (["x/train-00000-of-00128.tar", "x/eval.v2_7.tar"], ["train", "eval.v2"]),
        (["/data/000001.tar", "/data/000002.tar"], ["000001", "000002"]),
        ([], []),
    ],
)
def test_names(shards: list[str], names: list[str]) -> None:
    assert source_names(shards) == names


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a/", "b/a/", "/c/a/"]), st.sampled_from("xyz"), st.integers(0, 99))
    )
)
def test_shards_are_of_one_source_where_only_numbers_differ(found: list[tuple[str, str, int]]) -> None:
    shards = [f"{folder}{name}-{number:06}.tar" for folder, name, number in found]
    names = source_names(shards)
    for (folder, name, _), one in zip(found, names, strict=True):
        assert str(PurePath(folder, name)).endswith(one)
        assert [(f, n) == (folder, name) for f, n, _ in found] == [other == one for other in names]


def test_of_many_sources_the_last_have_no_name() -> None:
    names = source_names([f"{'x' * k}a.tar" for k in range(MOST + 5)])
    assert len(set(names)) == MOST + 1 and names[MOST:] == [OTHERS] * 5
