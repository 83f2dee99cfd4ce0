"""Full collections during training look at new objects alone."""

from __future__ import annotations

import gc
import weakref

import pytest

from mm.train.garbage import set_aside


class Node:
    """An object that keeps itself, which only the collector can free."""

    def __init__(self) -> None:
        self.own = self


def test_what_existed_is_set_aside_and_what_is_new_is_collected() -> None:
    before, garbage = Node(), weakref.ref(Node())
    many = [[n] for n in range(50_000)]
    with set_aside():
        assert garbage() is None, "garbage stayed"
        assert not any(x is before for x in gc.get_objects())
        thresholds, aged = gc.get_threshold(), Node()
        gc.set_threshold(50, 2, 2)
        gc.collect(1), gc.collect(1)  # it is old by now
        old = weakref.ref(aged)
        del aged
        _ = [Node() for _ in range(2000)]
        gc.set_threshold(*thresholds)
        assert old() is None, "full collections wait for as many objects as there were at the start"
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
    kept = weakref.ref(before)
    del before, many
    gc.collect()
    assert kept() is None, "it is in the collector's care again"


def test_an_error_gives_all_of_it_back() -> None:
    node = Node()
    with pytest.raises(KeyError), set_aside():
        raise KeyError
    assert any(x is node for x in gc.get_objects())
