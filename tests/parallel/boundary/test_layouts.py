"""Any two layouts, any placement: exact with the fewest bytes, or refused on all ranks
before any of them waits.

A longer run: pytest tests/parallel/boundary/test_layouts.py --cases 5000
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.sequence.stream import Order, alignment
from parallel.topology.layout import Layout, make_layout
from tests.parallel.boundary.cases import random_spec
from tests.parallel.boundary.joint import WORLD, Joint, attempt, check_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TAILS = [(1,), (3,), (2, 3), ()]


def draw(seed: int) -> Joint:
    """Any layouts on any of the ranks; ragged and empty items anywhere in any stream."""
    rng = random.Random(seed)
    specs = [random_spec(rng, rng.randint(1, WORLD), WORLD) for _ in range(2)]
    if rng.random() < 0.3:  # on the same ranks more often than by chance
        specs[1] = random_spec(rng, len(specs[0]["ranks"]), WORLD) | {"ranks": specs[0]["ranks"]}
    vision, llm = (make_layout(m, WORLD, s) for m, s in zip(("vision", "llm"), specs, strict=True))
    order: Order = rng.choice(["contiguous", "zigzag"])
    unit = alignment(llm.cp, llm.token_shards, order)
    filled, rows, llm_dp, position = [0] * llm.dp, [], [], []
    for _ in range(rng.choice([0, 1, 3, 9])):
        rows.append(rng.choice([0, 1, 2, 7]))
        llm_dp.append(rng.randrange(llm.dp))
        position.append(filled[llm_dp[-1]] + rng.choice([0, 0, 1, 4]))
        filled[llm_dp[-1]] = position[-1] + rows[-1]
    turn = rng.sample(range(len(rows)), len(rows))  # rows need not be in the order of their tokens
    rows, llm_dp, position = ([of[i] for i in turn] for of in (rows, llm_dp, position))
    joint = Joint(
        *specs,
        rows=rows,
        source_dp=[rng.randrange(vision.dp) for _ in rows],
        llm_dp=llm_dp,
        position=position,
        tokens=[-(-n // unit) * unit + unit * rng.choice([0, 1]) for n in filled],
        order=order,
        stages=tuple(sorted(rng.sample(range(llm.pp), rng.randint(1, llm.pp)))),
        node_size=rng.choice([None, 1, 2, 3]),
        dtype=rng.choice(DTYPES),
        tail=rng.choice(TAILS),
        transport=rng.choice(["p2p", "all_to_all"]),
    )
    return spoil(joint, rng, vision, llm, unit) if rng.random() < 0.2 else joint


def spoil(joint: Joint, rng: random.Random, vision: Layout, llm: Layout, unit: int) -> Joint:
    """A case that cannot be planned, with a part of the error that it must raise."""
    some = [i for i, n in enumerate(joint.rows) if n]
    ways = [replace(joint, vision=joint.vision | {"tp": 3 * vision.size}, wrong="needs a multiple of")]
    ways.append(replace(joint, llm=joint.llm | {"ranks": [WORLD]}, wrong="goes up to rank 4"))
    ways.append(replace(joint, stages=(llm.pp,), wrong="stages"))
    ways.append(replace(joint, tokens=joint.tokens[1:], wrong="a stream for each"))
    if unit > 1:
        ways.append(replace(joint, tokens=[n + 1 for n in joint.tokens], wrong="tokens long"))
    if some:
        i = rng.choice(some)
        ways.append(
            replace(
                joint, source_dp=[*joint.source_dp[:i], vision.dp, *joint.source_dp[i + 1 :]], wrong="dp rank"
            )
        )
        far = [*joint.position[:i], joint.tokens[joint.llm_dp[i]], *joint.position[i + 1 :]]
        ways.append(replace(joint, position=far, wrong="tokens long"))
        twice = {
            k: [*getattr(joint, k), getattr(joint, k)[i]] for k in ("rows", "source_dp", "llm_dp", "position")
        }
        ways.append(replace(joint, **twice, wrong="both at token"))
    return rng.choice(ways)


def run(seeds: range) -> list[str | list[int]]:
    return [attempt(draw(seed)) for seed in seeds]


def placement(a: Layout, b: Layout) -> str:
    """How two modules' ranks relate."""
    shared = set(a.ranks) & set(b.ranks)
    if not shared:
        return "disjoint"
    return "colocated" if set(a.ranks) == set(b.ranks) else "overlapping"


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--cases"))


def test_any_pair_of_layouts_is_exact_with_the_least_bytes_or_refused(ranks: Any, cases: int) -> None:
    seen: dict[str, int] = {}
    for low in range(0, cases, 150):
        seeds = range(low, min(low + 150, cases))
        everyone = ranks(WORLD, run, seeds, timeout=120)
        for seed, *found in zip(seeds, *everyone, strict=True):
            joint = draw(seed)
            if joint.wrong:
                assert len(set(map(str, found))) == 1 and joint.wrong in str(found[0]), (joint, found)
                kind = "refused"
            else:
                assert all(isinstance(f, list) for f in found), (joint, found)
                check_bytes(joint, found)
                kind = placement(*joint.layouts)
            seen[kind] = seen.get(kind, 0) + 1
    print(seen)
    assert sum(seen.values()) - seen["refused"] >= 200
    assert min(seen.get(k, 0) for k in ("colocated", "disjoint", "overlapping", "refused")) >= 10, seen
