"""In a step the host waits for its device once, and once more in each layer of experts that sends rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mm.config.outline import SINK
from mm.ranks.job import open_data
from mm.train.evaluate import evaluate
from mm.train.step import run_step
from mm.train.update import finish_step
from tests.host_waits import HostWaits
from tests.mm.harness import running, small

MESSAGE = "mm/ranks/control.py:_gather"  # each rank's small message of the step, and its read
SIZES = "parallel/expert_parallel/routing.py:_read"  # how many rows a layer sends and receives
PREPARE = (
    "encoders/compat.py",
    "encoders/media",
    "llm/model.py",
    "mm/ranks/batch.py",
)  # batches, from what is on the host

Found = tuple[Counter[str], int, float]


def job(layout: dict[str, Any], **llm: Any) -> dict[str, Any]:
    """A job of two micro-batches in float32: float64 has no grouped product."""
    raw = small(train={"dtype": "float32"}, schedule={"microbatches": 2}, layout=layout)
    raw["model"]["llm"] |= {"mtp_layers": 1, **llm}
    return raw


def step(raw: dict[str, Any]) -> Found:
    """(waits of a step, layers of experts times micro-batches on this rank, loss)."""
    with running(raw) as (here, feed):
        prepared, _ = feed.next(0, 1)
        with HostWaits() as waits:
            update = finish_step(here, run_step(here, prepared, train=True), 0, 1e-3)
        layers = sum(len(part.moe_layers()) for part in here.parts[SINK].values())  # type: ignore[operator]
        return waits.by_function(), layers * len(prepared.micro), update.loss


def steps(raws: list[dict[str, Any]]) -> list[Found]:
    return [step(raw) for raw in raws]


def evaluation(raw: dict[str, Any]) -> Counter[str]:
    """Waits of an evaluation of two batches, intact and with the items of each of two modules exchanged."""
    with running(raw) as (here, feed):
        data = open_data(here, feed.index)
        samples = feed.index.usable[: 2 * raw["train"]["global_batch"]]
        with HostWaits() as waits:
            evaluate(here, data, samples, seed=0)
        data.assembler.reader.close()
        return waits.by_function()


ALONE = job({})
EXCHANGED = job({"llm": {"tp": 2, "ep": 2, "sequence_parallel": True}, "audio": {"cp": 2}})
# With room for all rows, so that nothing is dropped.
PADDED = job({"llm": {"cp": 2, "etp": 2}, "vision": {"pp": 2}}, capacity=8.0, pad_experts=True)


def test_alone_the_host_waits_once_a_step(alone: Any) -> None:
    ((waits, layers, _),) = alone(1, step, ALONE)
    assert layers == 4 and waits == {MESSAGE: 1}


def test_an_evaluation_reads_its_sums_once(alone: Any) -> None:
    (waits,) = alone(1, evaluation, ALONE)
    # Each of three passes has a message a batch, about unreadable samples, and one for all its losses.
    assert Counter({k: n for k, n in waits.items() if not k.startswith(PREPARE)}) == {MESSAGE: 3 * (2 + 1)}


def test_the_host_waits_once_a_layer_of_experts_and_never_where_they_are_padded(ranks: Any) -> None:
    for exchanged, padded in ranks(2, steps, [EXCHANGED, PADDED], timeout=120):
        assert exchanged[:2] == ({SIZES: 4, MESSAGE: 1}, 4)
        assert padded[:2] == ({MESSAGE: 1}, 4)
        assert exchanged[2] == pytest.approx(padded[2], rel=1e-5)
