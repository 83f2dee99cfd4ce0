"""Comparisons that are run, of layouts whose answer is known: an encoder is slow on purpose."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from mm.compare.entry import described, rated, watched
from mm.compare.result import MEMORY_KINDS, Comparison
from mm.compare.rounds import Run, make_runs, one_round
from mm.compare.summary import summarise
from mm.compare.variants import Variant
from mm.compare.verdict import judge
from mm.config.schema import from_mapping, load_config
from mm.plan.blueprint import draw_up
from mm.ranks.launch import RankInfo
from mm.ranks.stop import Stop
from tests.mm.harness import CONFIGS, free_port, run_rank, small
from tests.mm.pages.strict_parser import Checked
from tests.mm.shards import npy, write_shard

SLOW = "tests.mm.compare.plugins:Slow"
BOTH = {"sensor": {"ranks": "all"}, "llm": {"ranks": "all"}}
ONE = {"sensor": {"ranks": "0"}, "llm": {"ranks": "all"}}
WHOLE = {"sensor": {"ranks": "all", "tp": 2}, "llm": {"ranks": "all", "tp": 2}}


def raw_of(folder: Path, layout: dict[str, Any], spin: float) -> dict[str, Any]:
    """The small job with a slow encoder, four series a step. spin: seconds of processor time for each."""
    raw = small(layout=layout, train={"steps": 6, "global_batch": 4, "dtype": "float32"})
    raw["model"] = {
        "sensor": {
            "encoder": SLOW,
            "projector": {"hidden": 8},
            "options": {"spin": spin},
        },
        "llm": raw["model"]["llm"],
    }
    raw["data"] = {"train": [str(folder / "*.tar")], "context": 64}
    return raw


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of samples with one series each."""
    folder = tmp_path_factory.mktemp("slow")
    samples = [
        {
            "key": f"s{k:03d}",
            "segments": [{"sensor": "sen0.npy"}, {"text": f"level {k}"}],
            "parts": {"sen0.npy": npy(torch.randn(5, 3, generator=torch.Generator().manual_seed(k)).numpy())},
        }
        for k in range(32)
    ]
    write_shard(folder / "a.tar", samples)
    return folder


def measured(folder: Path, layouts: dict[str, dict[str, Any]], rounds: int, spin: float = 0.03) -> Comparison:
    """A comparison on these ranks, which have a default group already."""
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    found = []
    for name, layout in layouts.items():
        cfg = from_mapping(raw_of(folder, layout, spin), CONFIGS)
        found.append(Variant(name, Path(f"{name}.yaml"), cfg, layout, {}))
    runs: list[Run] = make_runs(found, rank.world)
    for number in range(rounds):
        for run in runs:
            one_round(run, rank, 2, first=number == 0)
    out = []
    for run in runs:
        one = summarise(run.measured, runs[0].measured)
        one = described(one, run.variant, run.blueprint, Path("config.yaml"), ["train.lr=0.01"])
        out.append(watched(rated(one, rank.world, None), run.observed, run.memory))
    return judge(Comparison(out, rounds=rounds, world=rank.world, host={"device": "cpu", "cores": 64}))


def test_an_encoder_that_is_slow_on_one_rank_is_found(series: Path, ranks: Any) -> None:
    """Its work is 0.12 s on rank 0, or half of it on each rank. What is said does not depend on other work on
    this machine: the encoder takes processor time, and waiting for a core is told from it."""
    both, one = ranks(2, measured, series, {"one": ONE, "both": BOTH}, 1, timeout=120)[0].runs[::-1]
    for run, rank_0, rank_1 in ((one, 0.12, 0.0), (both, 0.06, 0.06)):
        for rank, seconds in zip(run.ranks, (rank_0, rank_1), strict=True):
            spun = [a.processor for a in rank.actions if (a.module, a.kind) == ("sensor", "forward")]
            assert sum(spun) == pytest.approx(seconds, abs=0.04), (run.name, rank.rank)
        assert run.timeline is not None and {b.row for b in run.timeline.bars} == {0, 1}
        assert sum(r.memory["weights"] for r in run.ranks) > 0 and set(run.memory_by_kind) == set(
            MEMORY_KINDS
        )
        assert run.memory_by_kind == run.ranks[run.fullest_rank].memory
        # The encoder has half a promille of the FLOPs: they point the wrong way.
        assert run.flops_by_module["sensor"] < 0.1 * run.flops_by_module["llm"]
    assert one.bound is not None and (one.bound.module, one.bound.rank) in (("sensor", 0), ("", 0), ("", 1))
    if one.bound.limit != "cores":  # on a machine that has other work
        assert one.bound.limit == "uneven" and "rank 1 does not have it" in one.bound.text
    assert one.losses == pytest.approx(both.losses, rel=1e-5)
    json.dumps(asdict(Comparison([one, both])))  # plain data


def asked_to_end(folder: Path) -> int:
    """Timed steps of a round that rank 1 alone was asked to end, before its first."""
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    cfg = from_mapping(raw_of(folder, BOTH, 0.0), CONFIGS)
    (run,) = make_runs([Variant("both", Path("both.yaml"), cfg, BOTH, {})], rank.world)
    stop = Stop(rank=True)
    stop.requested = rank.rank == 1
    with pytest.raises(KeyboardInterrupt):
        one_round(run, rank, 2, first=True, watch=False, stop=stop)
    return len(run.measured.losses)


def test_a_request_to_one_rank_ends_a_comparison_on_all(series: Path, ranks: Any) -> None:
    assert ranks(2, asked_to_end, series, timeout=120) == [0, 0]


def test_the_command_writes_its_page_and_its_json(series: Path, tmp_path: Path, ranks: Any) -> None:
    config, page, out = tmp_path / "c.yaml", tmp_path / "page.html", tmp_path / "out.json"
    config.write_text(yaml.safe_dump(raw_of(series, BOTH, 0.0)))
    files = []
    for name, layout in {"one": ONE, "both": BOTH}.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({"layout": layout}))
    argv = ["compare", str(config), "--steps=2", "--rounds=1", f"--json={out}", f"--report={page}"]
    ended = ranks(2, run_rank, [*argv, "--layouts", *map(str, files)], free_port(), timeout=120)
    assert [e.code for e in ended] == [0, 0], ended
    assert [run["name"] for run in json.loads(out.read_text())["runs"]] == ["one", "both"]
    shown = "".join(Checked(page.read_text()).said)
    assert "both" in shown and all(path.name in shown for path in files)


@pytest.mark.slow
def test_verdicts_of_layouts_whose_order_is_known(series: Path, ranks: Any) -> None:
    """The encoder cannot be sharded, so under tp both ranks have all items, as the one rank has in `one`."""
    layouts = {"tp2": WHOLE, "one": ONE, "dp2": BOTH}
    found = ranks(2, measured, series, layouts, 3, 0.15, timeout=300)[0]
    assert "dp2" in found.verdict.fastest, found.verdict
    queued = sum(a.queued for run in found.runs for rank in run.ranks for a in rank.actions)
    if queued < 0.05 * sum(rank.step_s for run in found.runs for rank in run.ranks):  # a core for each rank
        assert found.verdict.fastest == ["dp2"], found.verdict
        assert found.verdict.sentences[0].startswith("dp2 is the fastest")
    assert any(s.startswith("FLOPs mislead: in dp2, sensor has") for s in found.verdict.sentences)
    tp2, one, dp2 = found.runs
    assert dp2.bound.limit in ("computing", "cores") and one.bound.limit in ("uneven", "cores")
    assert tp2.bound.limit in ("computing", "cores")
    assert sum(tp2.memory_by_kind.values()) < 64 << 20  # tensors alone, not the process


def test_the_command_of_a_layout_trains_it(series: Path, tmp_path: Path) -> None:
    import yaml

    layout = {"sensor": {"ranks": [1, 0], "tp": 2}, "llm": {"ranks": "all", "pp": 2}}
    raw = raw_of(series, BOTH, 0.0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    cfg = from_mapping({**raw, "layout": layout, "schedule": {"microbatches": 4, "kind": "gpipe"}}, tmp_path)
    schedule = {"microbatches": 4, "kind": "gpipe"}
    variant = Variant("it", Path("it.yaml"), cfg, layout, schedule)
    one = described(
        summarise_nothing(), variant, draw_up(cfg, 2), tmp_path / "config.yaml", ["train.lr=0.01"]
    )
    words = shlex.split(one.command)
    assert words[:4] == ["python", "-m", "mm", "train"] and words[-1] == "--nproc=2"
    again = load_config(Path(words[4]), words[5:-1])
    assert (again.layout, again.schedule) == (cfg.layout, cfg.schedule) and again.train.lr == 0.01
    assert one.placed["sensor"].ranks == [1, 0] and one.placed["sensor"].degrees["tp"] == 2
    assert one.placed["llm"].places[1] == {"tp": 0, "cp": 0, "dp": 0, "pp": 1}


def summarise_nothing() -> Any:
    from mm.compare.summary import Measured

    nothing = Measured("it", {})
    return summarise(nothing, nothing)
