"""A number that is not finite is told as what it is, with the rank and module that gave it first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.module import EncoderModule
from mm.errors import NonFinite
from mm.ranks.job import Job
from mm.train.blame import CAME, CAME_BACK, GAVE, Findings, Part, Place, brought, of_sums, origin
from mm.train.one_step import train_step
from parallel.sharding import whole
from parallel.sharding.param import declared, local
from tests.mm.harness import running, small
from tests.slow import on_demand

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {},
    "disjoint, pipeline": {
        "vision": {"ranks": "0-1"},
        "audio": {"ranks": "0-1"},
        "llm": {"ranks": "2-3", "pp": 2},
    },
    "mixed, sharded": {
        "vision": {"ranks": "1-2", "data_parallel": "zero3"},
        "audio": {"ranks": [0]},
        "llm": {"tp": 2, "data_parallel": "zero3"},
    },
}


def part(job: Job, module: str) -> nn.Module:
    return next(iter(job.parts[module].values()))


def output(module: str, job: Job) -> None:
    """The encoder's features are not finite."""

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        return out._replace(values=out.values * float("nan"))

    encoder = part(job, module)
    assert isinstance(encoder, EncoderModule)
    encoder.encoder.register_forward_hook(hook)


class _Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * float("inf")


def gradient(module: str, job: Job) -> None:
    """The gradient of what enters its first layer is not finite."""

    def hook(_: nn.Module, args: Any) -> Any:
        return (_Bad.apply(args[0]), *args[1:])

    layers: Any = part(job, module).layers
    next(iter(layers)).register_forward_pre_hook(hook)


def weight(module: str, job: Job) -> None:
    """A weight is not finite."""
    whole.free(part(job, module))
    held = (local(p.detach()) for _, p, _ in declared(part(job, module)))
    next(value for value in held if value.numel()).view(-1)[0] = float("nan")


def part_of_weight(module: str, job: Job) -> None:
    """What its backwards give the last weight is not finite; all that they take and leave is."""
    held(module, job).register_hook(lambda grad: torch.full_like(grad, float("nan")))


def once(module: str, job: Job) -> None:
    """The same, in one backward alone."""
    left = [1]
    held(module, job).register_hook(lambda grad: grad * (float("nan") if left and left.pop() else 1.0))


def held(module: str, job: Job) -> Tensor:
    """The last weight as backwards see it."""
    *_, (_, found, _) = declared(part(job, module))
    return found


BROKEN = {"output": output, "gradient": gradient, "weight": weight, "part": part_of_weight, "once": once}


def said(raw: dict[str, Any], kind: str, module: str, rank: int) -> str:
    """What a run says whose second step is broken on one rank."""
    with running(raw) as (job, feed):
        train_step(job, feed, 0)
        # All ranks gather, so that one can hang a hook on a weight as backwards see it.
        for each in job.parts.get(module, {}).values() if kind in ("part", "once") else ():
            whole.gather(each)
            whole.wait(each)
        if job.rank.rank == rank:
            BROKEN[kind](module, job)
        try:
            train_step(job, feed, 1)
        except NonFinite as error:
            return str(error)
    return "no error"


CASES = [
    (
        "colocated",
        "output",
        "vision",
        1,
        "rows of module vision are not finite on rank 1 (micro-batch 0, sample",
    ),
    ("colocated", "weight", "llm", 2, " of module llm is not finite on rank 2: it was so before"),
    ("disjoint, pipeline", "output", "vision", 1, "rows of module vision are not finite on rank 1 (micro-"),
    ("disjoint, pipeline", "output", "audio", 0, "rows of module audio are not finite on rank 0 (micro-"),
    ("disjoint, pipeline", "gradient", "llm", 3, "that module llm gave is not finite on rank 3 (stage 1"),
    (
        "mixed, sharded",
        "output",
        "vision",
        2,
        "rows of module vision are not finite on rank 2 (micro-batch 0",
    ),
    ("mixed, sharded", "weight", "vision", 2, " of module vision is not finite on rank 2: it was so before"),
    (
        "mixed, sharded",
        "gradient",
        "audio",
        0,
        " of module audio and 3 more is not finite on rank 0, summed",
    ),
    ("colocated", "part", "llm", 2, "run again, rank 2 (data rank 2 of module llm, micro-batch 0, sample"),
    ("colocated", "once", "vision", 1, "run again, it is finite: a fault of memory or of a kernel"),
    ("disjoint, pipeline", "part", "audio", 1, "run again, rank 1 (data rank 1 of module audio, micro"),
    ("disjoint, pipeline", "part", "llm", 3, "run again, rank 3 (data rank 0 of module llm, micro-batch 0"),
    ("mixed, sharded", "part", "vision", 2, "run again, rank 2 (data rank 1 of module vision, micro-batch 0"),
    ("mixed, sharded", "part", "llm", 3, "run again, rank 3 (data rank 1 of module llm, micro-batch 0"),
]


NAMES = ("layout", "kind", "module", "rank", "told")


@pytest.mark.parametrize(
    NAMES, on_demand(CASES, [*CASES[:2], CASES[3], CASES[5], *CASES[8:12], CASES[13]], several=True)
)
def test_the_first_is_named(ranks: Any, layout: str, kind: str, module: str, rank: int, told: str) -> None:
    raw = small(layout=LAYOUTS[layout], schedule={"microbatches": 2})
    found = ranks(4, said, raw, kind, module, rank, timeout=100)
    assert told in found[0] and found[0].startswith("step 2: ") and "nothing was updated" in found[0]
    assert found == [found[0]] * 4


def test_the_origin_comes_before_what_it_spoils() -> None:
    rows, loss = Place("rows", "vision", 0, 1, ["a", "b", "c", "d"]), Place("the loss", "llm", 1, 0, [])
    spoilt = Findings(spots={CAME: [loss], CAME_BACK: [rows]}, gradients=["llm.x"])
    vision, other = Findings(spots={GAVE: [rows], CAME_BACK: [rows]}), Findings(spots={GAVE: [loss]})
    said = "rows of module vision are not finite on rank 2 (micro-batch 1, samples a, b, c and 1 more)"
    assert origin([spoilt, Findings(), vision]) == origin([spoilt, vision, vision]).replace(
        "ranks 1, 2", "rank 2"
    )
    assert origin([spoilt, Findings(), vision]) == said
    # The first micro-batch is the first; the loss is told as such.
    assert (
        origin([vision, other]) == "the loss of module llm is not finite on rank 1 (stage 1, micro-batch 0)"
    )
    assert "what came to module llm is not finite on rank 1" in origin([Findings(), spoilt])
    held = Findings(weights=["llm.a.b", "llm.c"], inputs=[rows])
    assert origin([vision, held]) == (
        "a.b of module llm and 1 more is not finite on rank 1: it was so before the step"
    )
    assert origin([vision, Findings(inputs=[rows])]).startswith(
        "an input of module vision is not finite on rank 1"
    )
    large = Findings(overflows=["audio.w"])
    assert origin([large]) == "the squared norm of the gradient of w of module audio is not finite on rank 0"
    assert [Findings.read(one.written()) for one in (spoilt, held, large)] == [spoilt, held, large]


def test_the_part_of_a_sum_is_that_of_the_first_micro_batch() -> None:
    late, first = Part("w", "llm", 0, 0, 1, ["a"]), Part("w", "llm", 3, 1, 0, ["b", "c"])
    assert brought([late, first, first._replace(name="v")], again=True) == (
        "; run again, rank 3 (data rank 1 of module llm, micro-batch 0, samples b, c) gives that of w of "
        "module llm and 1 more"
    )
    assert "their sum is not" in brought([], again=True) and "it is finite" in brought([], again=False)
    sums, rows = Findings(gradients=["llm.w"]), Place("rows", "vision", 0, 1, [])
    assert of_sums([Findings(), sums]) and not of_sums([Findings(spots={GAVE: [rows]}), sums])
