"""Several layouts compared: their names, their memory and what their times prove."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.box import SQUARE
from rich.console import Console

from mm.compare.early import reason
from mm.compare.result import Stopped
from mm.compare.rounds import Run, in_turn, naming, one_round, tell, until
from mm.compare.summary import Measured, speedup_interval, summarise, verdict
from mm.compare.table import table
from mm.compare.variants import Variant, distinct_names
from mm.config.schema import from_mapping
from mm.errors import DataError
from mm.plan.blueprint import draw_up
from mm.ranks.launch import RankInfo
from mm.ranks.memory import OWN
from tests.mm.harness import CONFIGS, small

NAMES = ["homogeneous-tp2", "homogeneous-tp4", "homogeneous-tp4-sequence-parallel"]


def timed(name: str, *rounds: list[float]) -> Measured:
    run = Measured(name, {}, [*map(list, rounds)], losses=[1.0], grad_norms=[{"llm": 1.0}])
    run.tokens = [10] * len(run.step_s)
    return run


def shown(width: int) -> list[str]:
    """The layout column of a table of this width, a name a row."""
    runs = [timed(name, [0.1], [0.1], [0.1]) for name in NAMES]
    out = Console(width=width, file=io.StringIO())
    found = table([summarise(run, runs[0]) for run in runs])
    found.box, found.show_lines = SQUARE, True  # the same table with lines between its cells
    out.print(found)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    rows = re.split(r"[├└].*[┤┘]\n", text.partition("┤\n")[2])[:-1]
    return ["".join(line.split("│")[1].strip() for line in row.splitlines()) for row in rows]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 250])
def test_names_are_whole_at_any_width(width: int) -> None:
    assert shown(width) == NAMES


def test_two_files_never_have_one_name() -> None:
    files = [Path(p) for p in ("a/tp.yaml", "b/tp.yaml", "b/dp.yaml", "a/tp.yaml")]
    assert distinct_names(files) == ["a/tp (1)", "b/tp", "dp", "a/tp (2)"]


def test_one_timed_step_tells_nothing() -> None:
    slow, fast = timed("slow", [1.3]), timed("fast", [0.3])
    entry = summarise(fast, slow)
    assert entry.speedup == pytest.approx(4.33, abs=0.01)
    assert (entry.speedup_interval, entry.speedup_verdict) == (None, "too few steps")


def test_an_entry_of_the_json_has_these_keys_in_this_order() -> None:
    """Other people's scripts read it."""
    base = timed("base", [1.0], [1.1], [1.2])
    written = json.loads(json.dumps(asdict(summarise(base, base))))
    assert ",".join(written).startswith(
        "name,layout,step_s,tokens_per_s,peak_memory_bytes,boundary_bytes_per_step,losses,"
        "grad_norms_by_module,max_rel_loss_diff,max_rel_grad_norm_diff,speedup,speedup_interval,"
        "speedup_verdict"
    )
    assert list(written["step_s"].items()) == [("median", 1.1), ("min", 1.0), ("max", 1.2)]
    assert written["speedup_interval"] == [1.0, 1.0] and written["speedup_verdict"] == "baseline"
    assert written["grad_norms_by_module"] == [{"llm": 1.0}]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[1.0], [1.01], [0.99]], [[2.0], [2.02], [2.01]], "faster"),
        ([[2.0], [2.02], [2.01]], [[1.0], [1.01], [0.99]], "slower"),
        ([[1.0], [1.4], [0.8]], [[1.1], [1.2], [1.3]], "within noise"),
        ([[1.0, 1.0, 1.0]], [[2.0, 2.1, 1.9]], "too few steps"),  # one round, which may have been a bad one
        ([[1.0] * 5, [1.0] * 5], [[1.1] * 5, [1.9] * 5], "within noise"),  # so may two
        ([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]], [[2.0, 4.1, 7.9], [2.1, 4.0, 8.1]], "faster"),  # steps differ
        ([[1.0]], [[2.0]], "too few steps"),
        # Steps of a round go up and down together: that three rounds have thirty steps proves no more.
        ([[1.0] * 10, [1.0] * 10, [1.2] * 10], [[1.1] * 10, [1.15] * 10, [1.1] * 10], "within noise"),
    ],
)
def test_a_difference_is_distinguished_from_noise(
    ours: list[list[float]], theirs: list[list[float]], expected: str
) -> None:
    assert verdict(speedup_interval(ours, theirs)) == expected


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_equal_layouts_are_seldom_called_different(rounds: int) -> None:
    """At 95 % confidence one comparison in twenty is, of rounds that are faster or slower as a whole too."""
    draw, wrong = random.Random(0), 0

    def drawn() -> list[list[float]]:
        levels = [draw.lognormvariate(0, 0.2) for _ in range(rounds)]
        return [[level * draw.lognormvariate(0, 0.1) for _ in range(4)] for level in levels]

    for _ in range(400):
        wrong += verdict(speedup_interval(drawn(), drawn())) in ("faster", "slower")
    assert wrong <= 40 and (wrong >= 5) == (rounds > 1)


def test_what_fails_says_under_which_layout() -> None:
    variant = Variant("wide", Path("layouts/wide.yaml"), from_mapping(small(), CONFIGS), {}, {})
    with pytest.raises(MemoryError) as error, naming(variant, 1, 3):
        raise MemoryError("no more")
    assert error.value.__notes__ == ["under the layout wide (layouts/wide.yaml), in round 2 of 3"]


def test_a_message_for_users_says_under_which_layout() -> None:
    """The command line shows no notes of these."""
    variant = Variant("wide", Path("layouts/wide.yaml"), from_mapping(small(), CONFIGS), {}, {})
    with (
        pytest.raises(DataError, match=r"^layouts/wide.yaml, in round 2 of 3: no data$"),
        naming(variant, 1, 3),
    ):
        raise DataError("no data")


def test_the_rank_that_knows_the_reason_names_it() -> None:
    """Rank 0 has seen a connection break, or a signal of torchrun: rank 1 was first to know why."""
    store = dist.HashStore()
    ranks = [RankInfo(r, 2, torch.device("cpu"), store=store) for r in range(2)]
    asked = reason(KeyboardInterrupt(), ranks[0], "wide", "wide.yaml", 1)
    assert asked == Stopped("wide", "wide.yaml", 1, None, "interrupted", True)
    failed = Stopped("wide", "wide.yaml", 1, 1, "no data")
    assert reason(DataError("no data"), ranks[1], "wide", "wide.yaml", 1) == failed
    for error in (KeyboardInterrupt(), DataError("gone")):
        assert reason(error, ranks[0], "wide", "wide.yaml", 1) == failed


def test_what_hinders_the_telling_of_an_early_end_does_not_take_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Gone(dist.HashStore):
        def compare_set(self, *_: object) -> bytes:
            raise RuntimeError("no store")

    rank = RankInfo(1, 2, torch.device("cpu"), store=Gone())
    assert reason(DataError("no data"), rank, "wide", "w", 1) == Stopped("wide", "w", 1, 1, "no data")

    def early(_: object) -> None:
        raise OSError("disk full")

    tell(early, None)  # type: ignore[arg-type]  # of no comparison
    assert "what was measured is not written as a whole: disk full" in capsys.readouterr().err


def test_what_was_measured_before_an_early_end() -> None:
    """Layouts have ended 2, 1 and 0 rounds, and the first some steps of one more. The second fails."""
    runs: Any = []
    for name, done, rounds in (("a", 2, [[1.0], [2.0], []]), ("b", 1, [[1.0], []]), ("c", 0, [[]])):
        cfg = from_mapping(small(), CONFIGS)
        runs.append(Run(Variant(name, Path(name), cfg, {}, {}), None, timed(name, *rounds), done=done))
    (failed,) = until(runs, Stopped("b", "b", 2, 1, "no more"))
    assert failed.variant.name == "a" and failed.measured.rounds == [[1.0], [2.0]]
    kept = until(runs, Stopped("b", "b", 2, None, "interrupted", True))
    assert [(r.variant.name, r.done, r.measured.rounds) for r in kept] == [
        ("a", 1, [[1.0]]),
        ("b", 1, [[1.0]]),
    ]
    assert [len(r.measured.tokens) for r in kept] == [1, 1]


def test_layouts_change_places_from_round_to_round() -> None:
    """In A B A B one layout is always the one behind: what the first leaves behind would be its own."""
    runs: Any = ["a", "b", "c"]
    assert [in_turn(runs, number) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def peaks(names: list[str]) -> list[int]:
    """Peak memory under each schedule, in this order; one process."""
    out = []
    for name in names:
        raw = small(schedule={"microbatches": {"whole": 1, "split": 12}[name]}, train={"global_batch": 48})
        cfg = from_mapping(raw, CONFIGS)
        run = Run(Variant(name, Path(), cfg, {}, {}), draw_up(cfg, 1), Measured(name, {}))
        one_round(run, RankInfo(0, 1, torch.device("cpu")), 1, first=True)
        out.append(run.measured.peak_memory_bytes)
    return out


@pytest.mark.skipif(not (OWN / "clear_refs").exists(), reason="a peak can be forgotten on Linux alone")
@pytest.mark.slow
def test_a_layouts_memory_does_not_depend_on_those_before_it(ranks: Any) -> None:
    before, most, after = ranks(1, peaks, ["split", "whole", "split"])[0]
    assert most - before > 16 << 20 and abs(after - before) < (most - before) / 2
