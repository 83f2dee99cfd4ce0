"""What a refusal names, typed as it stands, is accepted by the whole check of the config."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mm.config.advice import with_changes
from mm.config.schema import Config, from_mapping
from mm.errors import Refused
from mm.plan.blueprint import check_outline, draw_up
from parallel.schedule import ModuleUse, ScheduleOptions, make_schedule
from parallel.topology.layout import Unfit, make_layout
from tests.mm.harness import CONFIGS, small

MODULES = ("vision", "audio", "llm")


def config(layout: dict[str, Any], schedule: dict[str, Any], **llm: Any) -> Config:
    raw = small(layout=layout, schedule=schedule)
    raw["model"]["llm"] |= llm
    return from_mapping(raw, CONFIGS)


def refusal(cfg: Config, world: int) -> str | None:
    try:
        draw_up(cfg, world)
    except Refused as error:
        return str(error)
    return None


def alternatives(message: str) -> list[dict[str, Any]]:
    """What a refusal names, as the command line would read it."""
    advice = message.partition("nearest: ")[2]
    changes = [[c.partition("=") for c in a.split(" ")] for a in advice.split(" or ")] if advice else []
    return [{key: yaml.safe_load(value) for key, _, value in one} for one in changes]


def spec(rng: random.Random, world: int) -> dict[str, Any]:
    """Layout keys that work, at least on their own: degrees of the small model's modules."""
    ranks = rng.sample(range(world), rng.randint(1, world))
    degrees = {"pp": rng.choice([d for d in (1, 2) if len(ranks) % d == 0])}
    left = len(ranks) // degrees["pp"]
    degrees["tp"] = rng.choice([d for d in (1, 2, 4) if left % d == 0])
    return {"ranks": ranks, **degrees}


def spoil(rng: random.Random, layout: dict[str, Any], schedule: dict[str, Any], world: int) -> None:
    """Change one key to what may not work."""
    module = rng.choice(MODULES)
    what = rng.choice(
        ["tp", "cp", "pp", "vpp", "ep", "etp", "ranks", "kind", "microbatches", "ahead", "batch"]
    )
    if what == "ranks":
        layout[module]["ranks"] = rng.choice([f"0-{world}", [0, 0], [world + 1]])
    elif what == "kind":
        kinds = ["1f1b", "gpipe", "interleaved", "fill", "three_phase", "zero_bubble", "sequential"]
        schedule["kind"] = rng.choice(kinds)
    elif what == "batch":
        schedule["encoder_batch"] = {rng.choice(MODULES[:2]): rng.randint(2, 5)}
    elif what in ("microbatches", "ahead"):
        schedule[what] = rng.randint(1, 5)
    else:
        layout[module][what] = rng.randint(2, 9)


@pytest.mark.slow
@settings(max_examples=80)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_what_a_refusal_names_is_accepted(seed: int, world: int) -> None:
    rng = random.Random(seed)
    layout = {m: spec(rng, world) for m in MODULES}
    schedule: dict[str, Any] = {"microbatches": rng.randint(1, 5)}
    if layout["llm"]["pp"] > 1 and rng.random() < 0.5:
        layout["llm"]["vpp"], schedule["microbatches"] = 2, 2 * rng.randint(1, 3)
    assert refusal(config(layout, schedule), world) is None
    spoil(rng, layout, schedule, world)
    cfg = config(layout, schedule)
    message = refusal(cfg, world)
    if message is None:
        return
    assert alternatives(message), message
    for changes in alternatives(message):
        assert refusal(with_changes(cfg, changes), world) is None, (message, changes)


@settings(max_examples=10)
@example(seed=847282, world=2)
@given(seed=st.integers(0, 2**32), world=st.sampled_from([1, 2, 4, 6, 8]))
def test_following_advice_ends_where_everything_works(seed: int, world: int) -> None:
    """With several faults each refusal mends one of them."""
    rng = random.Random(seed)
    layout = {m: spec(rng, world) for m in MODULES}
    schedule: dict[str, Any] = {"microbatches": rng.randint(1, 5)}
    for _ in range(4):
        spoil(rng, layout, schedule, world)
    cfg, said = config(layout, schedule), []
    while (message := refusal(cfg, world)) is not None:
        said.append(message)
        assert len(said) < 9, said
        assert alternatives(message), said
        cfg = with_changes(cfg, rng.choice(alternatives(message)))


@pytest.mark.parametrize(
    ("world", "layout", "schedule", "words"),
    [
        (6, {"llm": {"tp": 6}}, {}, "does not divide by tp=6; nearest: layout.llm.tp=2"),
        (4, {"llm": {"pp": 4, "vpp": 2}}, {"microbatches": 4}, "8 stages, but it has 4 layers"),
        (2, {"vision": {"ep": 2}}, {}, "ViT is given ep=2, but encoders have no experts"),
        (2, {"audio": {"etp": 2}}, {}, "FastConformer is given etp=2, but encoders have no experts"),
        (
            4,
            {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": "2-3"}},
            {"ahead": 2},
            "no effect",
        ),
        (2, {"llm": {"pp": 2}}, {"kind": "three_phase", "ahead": 2, "microbatches": 2}, "no effect"),
        (2, {}, {"encoder_batch": {"vision": 2}}, "but the step has schedule.microbatches=1"),
        (
            2,
            {},
            {"encoder_batch": {"vision": 3}, "microbatches": 2},
            "nearest: schedule.encoder_batch.vision=2",
        ),
        (4, {"llm": {"ranks": "0-7", "tp": 8}}, {}, "nearest: layout.llm.ranks=all layout.llm.tp=4"),
    ],
)
def test_what_has_no_effect_or_fits_nowhere_is_refused(
    world: int, layout: dict[str, Any], schedule: dict[str, Any], words: str
) -> None:
    cfg = config(layout, schedule)
    message = refusal(cfg, world)
    assert message is not None and words in message and alternatives(message), message
    for changes in alternatives(message):
        assert refusal(with_changes(cfg, changes), world) is None, (message, changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.recompute": ["scan", "norm"], "model.llm.pattern": "*E-"}, "train.recompute=['norm']"),
        ({"train.recompute": "scan", "model.llm.pattern": "*E-"}, "train.recompute=False"),
        ({"eval.every": 3}, "eval.every=0"),
        ({"model.llm.level_layers": [0]}, "model.llm.level_layers=[]"),
        ({"model.vision.options.levels": [0]}, "model.llm.level_layers=[0]"),
        ({"model.llm.z_weight": 0.1, "model.llm.pattern": "M*-"}, "model.llm.z_weight=0.0"),
        ({"model.llm.n_kv_heads": 3}, "model.llm.n_kv_heads=2 or model.llm.n_kv_heads=4"),
        ({"model.llm.pattern": "M|E|*|-", "layout.llm.pp": 2}, "layout.llm.pp=4 or model.llm.pattern=ME*-"),
        ({"model.vision.options.heads": 5}, "model.vision.options.heads=4 or model.vision.options.heads=6"),
        ({"model.vision.projector.hidden": 9, "layout.vision.tp": 2}, "layout.vision.tp=1"),
    ],
)
def test_options_are_refused_with_what_works(changes: dict[str, Any], words: str) -> None:
    cfg = with_changes(config({}, {}), changes)
    message = refusal(cfg, 4)
    assert message is not None and message.endswith(f"nearest: {words}"), message
    for alternative in alternatives(message):
        assert refusal(with_changes(cfg, alternative), 4) is None, (message, alternative)


def test_legal_keys_that_change_nothing_are_accepted() -> None:
    one = {"tp": 1, "cp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": 1, "sequence_parallel": True, "ranks": "0-0"}
    schedule = {"ahead": 1, "encoder_batch": {"vision": 1}}
    assert refusal(config(dict.fromkeys(MODULES, one), schedule), 1) is None


def test_a_schedule_alone_says_what_works() -> None:
    """Without a config: what make_schedule names, applied to its arguments."""
    seen = set()
    for seed in range(60):
        rng = random.Random(seed)
        specs = {m: {"pp": rng.choice([1, 2, 4]), "tp": rng.choice([1, 2])} for m in ("vision", "llm")}
        specs["llm"]["vpp"] = rng.choice([1, 2, 3]) if specs["llm"]["pp"] > 1 else 1
        options = {"schedule.kind": rng.choice(["auto", "1f1b", "interleaved", "fill", "zero_bubble"])}
        options |= {"schedule.microbatches": rng.randint(1, 9), "schedule.ahead": rng.choice([None, None, 1])}
        error = attempt(specs, options)
        if error is None:
            continue
        seen.add(kind_of(error))
        assert error.works, error
        for changes in error.works:
            again = {m: dict(s) for m, s in specs.items()}
            for key, value in changes.items():
                module, _, degree = key.removeprefix("layout.").partition(".")
                if not key.startswith("schedule."):
                    again[module if degree else str(error.module)][degree or key] = value
            left = attempt(again, options | changes)
            assert left is None or kind_of(left) != kind_of(error), (str(error), changes, str(left))
    assert len(seen) >= 4, seen


def kind_of(error: Unfit) -> str:
    return re.sub(r"\d+", "", error.why)[:40]


def attempt(specs: dict[str, Any], options: dict[str, Any]) -> Unfit | None:
    modules = {m: ModuleUse(make_layout(m, 8, s), layers=7, params="step") for m, s in specs.items()}
    active = [{"vision"}] * options["schedule.microbatches"]
    try:
        bound = ScheduleOptions(ahead=options["schedule.ahead"])
        make_schedule(options["schedule.kind"], modules, sink="llm", active=active, options=bound)
    except Unfit as error:
        return error
    return None


@pytest.mark.parametrize(
    ("llm", "schedule", "words"),
    [
        ({"ep": 2}, {"microbatches": 1}, "microbatches=1"),
        ({}, {"microbatches": 2}, "ep=1 and etp=1"),
        ({"ep": 2, "data_parallel": "zero3"}, {"microbatches": 2}, "data_parallel=zero3"),
        ({"ep": 2, "pp": 2}, {"microbatches": 2, "kind": "zero_bubble"}, "kind zero_bubble"),
        ({"ep": 4, "tp": 4}, {"microbatches": 2}, "one data rank"),
    ],
)
def test_pairs_that_cannot_be_are_refused_with_what_works(
    llm: dict[str, Any], schedule: dict[str, Any], words: str
) -> None:
    cfg = config({"llm": llm}, {**schedule, "overlap_experts": True})
    message = refusal(cfg, 4)
    assert message is not None and words in message
    named = alternatives(message)
    assert named and all(refusal(with_changes(cfg, changes), 4) is None for changes in named)
    assert refusal(with_changes(cfg, {"schedule.overlap_experts": "auto"}), 4) is None


def test_a_small_model_of_default_policy_may_have_pairs() -> None:
    cfg = config({"llm": {"ep": 2}}, {"microbatches": 2, "overlap_experts": True})
    check_outline(cfg, 4)
    plan = draw_up(cfg, 4).schedule([set(cfg.model)] * 2)
    assert any(a.paired for _, a in plan)
