"""Predictions of many candidates by one predictor, which shares what it has found, and by one each."""

from __future__ import annotations

import random
from pathlib import Path

from mm.commands.plan import DRAWN
from mm.config.schema import Config, from_mapping
from mm.predict.hardware import load_hardware
from mm.search.candidate import Candidate
from mm.search.limits import space_of
from mm.search.neighbours import changes
from mm.search.pieces import Pieces
from mm.search.plan import plain_candidate, step_load
from mm.search.predictor import Judged, Predictor
from mm.search.tree import Tree
from tests.mm.harness import CONFIGS, small

H100 = load_hardware("h100")
WORLD = 8


def config() -> Config:
    raw = small(data={"train": ["nothing-*.tar"], "context": 128})
    raw["train"] |= {"dtype": "bfloat16", "global_batch": 16}
    return from_mapping(raw, Path())


def some(cfg: Config, count: int, seed: int) -> list[Candidate]:
    """Random candidates, each with all that differ from it in one thing."""
    predictor, plain = Predictor(cfg, WORLD, H100), plain_candidate(cfg, WORLD)
    blueprint = predictor.blueprint(plain.config(cfg))
    pieces = Pieces(blueprint, step_load(predictor, blueprint), H100, None)
    space, rng = space_of(blueprint), random.Random(seed)
    tree = Tree(space, pieces, 1e15, float("inf"), lambda *_: None)
    roots, found = list(tree.roots()), list[Candidate]()
    while len(found) < count:
        node = rng.choice(roots)
        while not node.leaf and (below := list(tree.expand(node))):
            node = rng.choice(below)
        if node.leaf:
            one = tree.candidate(node)
            around = [candidate for _, candidate in changes(space, one)]
            found += [one, *around]
    return found


def figures(judged: Judged) -> tuple[object, ...]:
    """All that is predicted, to the last bit."""
    found = judged.prediction
    if found is None:
        return (judged.why,)
    memory = {rank: dict(kinds) for rank, kinds in found.memory.items()}
    line = found.timeline
    return judged.why, found.step_s, dict(found.breakdown), memory, list(line.begins), list(line.ends)


def test_what_candidates_share_changes_no_prediction() -> None:
    cfg = config()
    together = Predictor(cfg, WORLD, H100)
    found = [candidate for seed in (1, 4) for candidate in some(cfg, 20, seed)]
    assert {"colocated", "mixed"} <= {c.placement for c in found}
    for candidate in found:
        alone = Predictor(cfg, WORLD, H100).judge(candidate)
        assert figures(together.judge(candidate)) == figures(alone), candidate.describe()


def test_steps_are_drawn_where_the_data_have_more_samples_than_one() -> None:
    cfg = from_mapping(small(), CONFIGS)
    predictor = Predictor(cfg, 2, H100)
    found = predictor.drawn(cfg, DRAWN)
    assert found is not None and len(found.steps) == DRAWN
    assert found.steps[0].step_s == predictor.of_config(cfg).step_s
    assert found.jitter_s > 0
    made_up = config()  # all samples are in one step
    assert Predictor(made_up, 2, H100).drawn(made_up, DRAWN) is None
