"""Labels of points cover neither each other nor a point, also where points are in one place."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mm.pages.labels import DOT, Box, labels

ROOM = Box(440, 160, 880, 320)
near = st.tuples(st.floats(830, 870), st.floats(10, 40))
anywhere = st.tuples(st.floats(0, 880), st.floats(0, 320))


@given(st.lists(st.one_of(near, anywhere, st.just((850.0, 20.0))), min_size=30, max_size=30))
def test_labels_of_thirty_points_cover_nothing(points: list[tuple[float, float]]) -> None:
    boxes = labels(points, [str(k) for k in range(1, 31)], ROOM)
    assert not any(a.meets(b) for a, b in itertools.combinations(boxes, 2))
    dots = [Box(x, y, 2 * DOT, 2 * DOT) for x, y in points]
    assert not any(box.meets(dot) for box in boxes for dot in dots)
    assert all(box.inside(ROOM) for box in boxes)
