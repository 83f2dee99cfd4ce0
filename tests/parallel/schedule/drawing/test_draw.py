"""Drawings: SVG and PNG of the same shapes."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from parallel.schedule import Action, Costs, Kind, Record, simulate
from parallel.schedule.action import COMPUTE
from parallel.schedule.drawing.chart import Chart, measured, simulated
from parallel.schedule.drawing.draw import colours, draw
from parallel.schedule.drawing.save import save
from parallel.schedule.drawing.shapes import Box, Curve, Text
from parallel.schedule.drawing.svg import to_svg
from tests.parallel.schedule.cases import plan_of

MIXED = {"vision": {"ranks": "1-4"}, "audio": {"ranks": 0}, "llm": {"ranks": "1-4", "pp": 4}}


def chart() -> Chart:
    costs = Costs(transfer={("audio", Kind.BOUNDARY_FORWARD): 0.5})
    return simulated(simulate(plan_of("auto", 5, 6, MIXED, costs=costs), costs))


def test_every_computation_and_boundary_is_drawn_once() -> None:
    found = chart()
    plan = plan_of("auto", 5, 6, MIXED)
    assert len(found.bars) == sum(a.kind in COMPUTE for _, a in plan)
    picture = draw(found)
    curves = [s for s in picture.shapes if isinstance(s, Curve)]
    assert len(curves) == len(found.arrows) + 1  # and one in the legend
    # Micro-batches from audio's rank to the language model's first stage and back.
    audio = [a for a in found.arrows if a.module == "audio"]
    assert sorted((a.source, a.target, a.backward) for a in audio) == [(0, 1, False)] * 6 + [(1, 0, True)] * 6
    assert {a.end - a.start for a in audio if not a.backward} == {0.5}


def test_everything_lies_on_the_paper_and_idle_time_stays_uncovered() -> None:
    found = chart()
    picture = draw(found)
    boxes = [s for s in picture.shapes if isinstance(s, Box)]
    assert all(b.x >= 0 and b.x + b.w <= picture.width and b.y + b.h <= picture.height for b in boxes)
    labels = [s.text for s in picture.shapes if isinstance(s, Text)]
    assert {"rank 0", "rank 4", "0", "5", "audio forward", "idle", "boundary"} <= set(labels)
    for k in range(len(found.rows)):
        busy = sum(b.end - b.start for b in found.bars if b.row == k)
        assert found.rows[k].bubble == pytest.approx(1 - busy / found.seconds)


def test_the_two_of_a_pair_share_a_row() -> None:
    plan = plan_of("1f1b", 2, 3, {"llm": {"ep": 2, "params": "step"}}, overlap_experts=True)
    records = [
        Record(Action(kind, "llm", i, paired=paired), start, end, start)
        for kind, i, paired, start, end in (
            (Kind.FORWARD, 0, False, 0.0, 1.0),
            (Kind.FORWARD, 1, True, 1.0, 3.5),
            (Kind.BACKWARD, 0, False, 1.5, 4.0),
            (Kind.FORWARD, 2, True, 4.0, 7.0),
            (Kind.BACKWARD, 1, False, 4.5, 7.0),
            (Kind.BACKWARD, 2, False, 7.0, 9.0),
        )
    ]
    for found in (simulated(simulate(plan)), measured(plan, {0: records})):
        halves = {(b.action.kind, b.action.microbatch): b.half for b in found.bars}
        forward, backward = ([halves[kind, i] for i in range(3)] for kind in (Kind.FORWARD, Kind.BACKWARD))
        assert (forward, backward) == ([0, 1, 1], [2, 2, 0])
        assert found.rows[0].bubble == 0  # the time that both take counts once
        fills = {colours(found, "llm")[k] for k in (0, 1)}
        boxes = [s for s in draw(found).shapes if isinstance(s, Box) and s.fill in fills][: len(found.bars)]
        for a, b in itertools.combinations(boxes, 2):
            aside = a.x + a.w <= b.x + 1e-6 or b.x + b.w <= a.x + 1e-6
            assert aside or a.y + a.h <= b.y or b.y + b.h <= a.y


def test_svg_is_well_formed_and_png_shows_the_same_colours(tmp_path: Path) -> None:
    found = chart()
    picture = draw(found, title="<four> stages & more")
    root = ET.fromstring(to_svg(picture))
    assert "<four> stages & more" in [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    save(picture, tmp_path / "step.svg")
    save(picture, tmp_path / "step.png")
    image = Image.open(tmp_path / "step.png").convert("RGB")
    assert image.size == (2 * picture.width, 2 * picture.height)
    bars = [b.action for b in found.bars]
    wanted = {colours(found, a.module)[0 if a.kind is Kind.FORWARD else 1] for a in bars}
    seen = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.getcolors(1 << 24) or []}
    assert len(wanted) == 6 and wanted <= seen
    with pytest.raises(ValueError, match=r"\.svg or \.png, given step\.pdf; nearest: step\.svg"):
        save(picture, tmp_path / "step.pdf")


def test_an_empty_step_has_a_picture_too() -> None:
    nothing = simulated(simulate(plan_of("auto", 1, 1, {"llm": {}}), Costs({("llm", k): 0.0 for k in Kind})))
    assert nothing.seconds == 0 and "schedule 1f1b" in to_svg(draw(nothing))
