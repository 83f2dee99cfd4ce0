"""The planner on a small model: its best few are those of predicting all, and others take what it writes."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mm.cli import main
from mm.config.advice import with_changes
from mm.config.schema import Config, from_mapping, load_config, load_layout_file, with_layout
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from mm.predict.hardware import load_hardware
from mm.search.candidate import of_config
from mm.search.first import Search
from mm.search.goals import Goal
from mm.search.limits import space_of
from mm.search.pieces import Pieces
from mm.search.plan import Planner, branches_above, plain_candidate, step_load
from mm.search.predictor import Predictor, on_nodes
from mm.search.tree import Node, Tree
from tests.mm.harness import CONFIGS, small
from tests.mm.pages.strict_parser import Checked
from tests.mm.search.toy import every

H100 = load_hardware("h100")


def config(**sections: Any) -> Config:
    raw = small(data={"train": ["nothing-*.tar"], "context": 128}, **sections)
    del raw["model"]["audio"]
    raw["train"] |= {"dtype": "bfloat16", "global_batch": 4}
    return from_mapping(raw, Path())


@pytest.mark.slow
def test_a_plan_is_one_layout_that_can_be_run() -> None:
    """What is returned is in the space, fits, and passes the whole check of a config."""
    cfg = config()
    plan = Planner(cfg, 2, H100, top=2, limit=2.0).plan()
    best = plan.best[0]
    assert best.why is None and best.step_s <= plan.best[-1].step_s
    assert best.step_s <= plan.searched["best"][0].step_s
    made = best.candidate.config(cfg)
    blueprint = draw_up(made, 2)
    assert of_config(made, 2, dict(blueprint.policies)) == best.candidate
    assert plan.nearest <= 1.0
    assert plan.considered > plan.predicted
    same = plan.of["homogeneous"]
    assert same is not None and same.candidate.homogeneous and same.step_s >= best.step_s


@pytest.mark.slow
def test_the_best_few_are_those_of_predicting_all() -> None:
    cfg = config()
    planner = Planner(cfg, 2, H100, top=5, limit=math.inf)
    plan = planner.plan()
    assert plan.proved and plan.nearest <= 1.0
    predictor = Predictor(cfg, 2, H100)
    plain = plain_candidate(cfg, 2)
    blueprint = predictor.blueprint(plain.config(cfg))
    load = step_load(predictor, blueprint)
    tree = Tree(space_of(blueprint), Pieces(blueprint, load, H100, None), math.inf)
    costs = []
    for leaf in every(tree):
        found = predictor.judge(tree.candidate(leaf))
        if found.why is None:
            assert leaf.bound <= found.step_s
            costs.append((found.step_s, leaf.key, found.candidate))
    expected = [candidate for _, _, candidate in sorted(costs, key=lambda c: c[:2])[:5]]
    assert [j.candidate for j in plan.searched["best"]] == expected
    assert plan.best[0].step_s <= plan.searched["best"][0].step_s


@pytest.mark.slow
def test_a_large_model_gets_a_layout_of_each_placement() -> None:
    """120.7B parameters on 256 devices: without starts that fit, a search of so many seconds found three
    layouts in all, none of them homogeneous, disjoint or mixed."""
    cfg = load_config(CONFIGS / "super-1024-colocated.yaml", ["train.global_batch=512"])
    plan = Planner(on_nodes(cfg, 256, H100), 256, H100, top=1, limit=45.0).plan()
    found = {name: plan.of[name] for name in ("homogeneous", "colocated", "disjoint", "mixed")}
    assert all(j is not None and j.why is None for j in found.values())
    assert plan.nearest <= 1.0
    best, alike = plan.best[0], found["homogeneous"]
    assert alike is not None and alike.candidate.homogeneous
    assert best.step_s <= min(j.step_s for j in found.values() if j is not None)
    assert best.step_s < 5.0 and alike.step_s < 5.0  # 8.65 s before, and none


def test_the_command_writes_what_others_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, layout = tmp_path / "c.yaml", tmp_path / "o.json", tmp_path / "best.yaml"
    page = tmp_path / "page.html"
    raw = small(data={"train": ["nothing-*.tar"], "context": 128})
    del raw["model"]["audio"]
    raw["train"] |= {"dtype": "bfloat16", "global_batch": 4}
    raw["model"]["llm"]["attention_cap"] = 30.0
    file.write_text(yaml.safe_dump(raw))
    command = ["plan", str(file), "--devices", "2", "--hardware", "h100"]
    search = ["--seconds", "0.5", "--json", str(out), "--out", str(layout)]
    assert main([*command, *search]) == 0
    found = json.loads(out.read_text())
    keys = {"layout", "schedule", "step_s", "tokens_per_s_per_device", "tflops_per_device"}
    keys |= {"peak_memory_bytes", "bubble_fraction", "boundary_s", "breakdown"}
    assert keys <= found["candidates"][0].keys()
    assert all({"layout", "why"} <= r.keys() for r in found["rejected"])
    draw_up(with_layout(from_mapping(raw, tmp_path), *load_layout_file(layout)), 2)
    beside = found["candidates"][0]["overrides"]  # what a layout file cannot have
    typed = [f"{key}={json.dumps(value)}" for key, value in beside.items()]
    assert main([*command, *typed, "--layout", str(layout), "--json", str(out), "--report", str(page)]) == 0
    one = json.loads(out.read_text())
    again, sentence = one["candidates"][0], "bounds of attention's scores"
    assert all(len(x["not_counted"]) == 1 and sentence in x["not_counted"][0] for x in (found, one))
    assert again["step_s"] == pytest.approx(found["candidates"][0]["step_s"], rel=1e-9)
    said = capsys.readouterr().out
    assert "s a step" in said and said.count(f"not counted as it runs: {sentence}") == 2
    shown = "".join(Checked(page.read_text()).said)
    assert "vision" in shown and f"Not counted as it runs: {sentence}" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices", "0"], "--devices 0; needed: 1 to"),
        (["--devices", "2", "--hardware", "h1000"], "did you mean h100?"),
        (["--devices", "2", "--top", "0"], "--top 0"),
        (["--within", "-1"], "--within -1; needed: a share, such as 0.05"),
        (["--layout", "a.yaml", "--out", "b.yaml"], "--out with --layout a.yaml: --out is of a search"),
        (["--json", "no/such/o.json"], "--json no/such/o.json: there is no folder no/such; needed: mkdir"),
        (["--out", "no/such/o.yaml"], "--out no/such/o.yaml: there is no folder"),
        (["--report", "/"], "--report /: this is a folder; needed: a file"),
        (["run.engine=megatron"], "a search is of this program"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    tmp_path: Path,
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before torch is imported, which takes seconds: what needs it cannot be imported here."""
    monkeypatch.setitem(sys.modules, "mm.search.predictor", None)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(small()))
    assert main(["plan", str(file), *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_model_larger_than_all_devices_is_refused_with_the_numbers() -> None:
    raw = small(data={"train": ["nothing-*.tar"], "context": 128})
    raw["model"]["llm"] = {"preset": "nemotron-3-nano-30b-a3b"}
    del raw["model"]["audio"]
    cfg = from_mapping(raw, Path())
    with pytest.raises(Refused, match=r"need \d+\.\d GB; 2 h100 have 163\.0 GB.*at least \d+ of them"):
        Planner(cfg, 2, H100).plan()


@pytest.mark.parametrize("pattern", ["*-*-", "M-M-", "*E*E", "ME*-"])
def test_what_may_be_computed_again_is_something_that_the_model_has(pattern: str) -> None:
    """A config that names a part of no layer is refused, and with it all candidates that recompute it."""
    raw = small()
    cfg = from_mapping({**raw, "model": {"llm": {**raw["model"]["llm"], "pattern": pattern}}}, Path())
    space = space_of(draw_up(cfg, 1))
    assert max(len(parts) for parts in space.recompute) >= 3
    for parts in space.recompute:
        draw_up(with_changes(cfg, {"train.recompute": list(parts) or False}), 1)


@dataclass(frozen=True)
class Leaf:
    """A candidate of one cost, whatever its bound says."""

    bound: float
    cost: float
    leaf: bool = True
    size: int = 1
    bytes: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        return (self.cost,)


def test_the_best_that_was_found_is_the_best_where_a_bound_was_too_high_too() -> None:
    """A search by bounds ends with the first; another that was predicted beside it is faster."""
    first, other, last = Leaf(2.0, 2.0), Leaf(9.0, 1.0), Leaf(9.5, 9.5)
    planner: Any = Planner(config(), 2, H100)
    planner.judged = {leaf: SimpleNamespace(step_s=leaf.cost, bytes=0.0) for leaf in (first, other)}
    search: Any = Search(lambda leaf: (), lambda leaf: leaf.cost, costs={first: 2.0, other: 1.0})
    rejects: Any = SimpleNamespace(left=lambda left, found: None)
    found, _ = planner._prove(
        search, [first, other, last], [Goal("best", 1, 1.0)], rejects, time.process_time() + 10.0
    )
    assert [judged.step_s for judged in found["best"]] == [1.0]


def test_bounds_of_all_branches_above_a_leaf_are_looked_at() -> None:
    frame: Any = None
    root, beside = Node((0,), frame, 3.0, 2), Node((1,), frame, 9.0, 1)
    near, far, leaf = Node((0, 1), frame, 5.0, 1), Node((0, 2), frame, 8.0, 1), Node((0, 1, 4), frame, 0.0, 1)
    search: Search[Node] = Search(lambda node: (), lambda node: 0.0, {root: (far, near), near: (leaf,)})
    assert [b.bound for b in branches_above(search, [beside, root], leaf)] == [3.0, 5.0, 0.0]
