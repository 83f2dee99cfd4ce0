"""Ranks that disagree are refused at the start: which key, which ranks, both values."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from mm.config.schema import from_mapping
from mm.errors import PolyrankError
from mm.plan.blueprint import draw_up
from mm.ranks import versions
from mm.ranks.agree import facts_of
from mm.ranks.rendezvous import check_same
from tests.mm.harness import CONFIGS, Ended, free_port, run_rank, small
from tests.mm.jobs.test_job import sensor_config
from tests.mm.shards import sensor_samples, write_shard


def compared(facts: list[dict[str, str]]) -> list[str]:
    """What each of so many ranks is told."""
    store, told = dist.HashStore(), [""] * len(facts)

    def one(rank: int) -> None:
        told[rank] = check_same(store, rank, len(facts), "facts", facts[rank], 20.0)

    threads = [threading.Thread(target=one, args=(r,)) for r in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_every_rank_is_told_which_key_differs_where() -> None:
    base = {"train.lr": "0.1", "torch": "2.13", "run.seed": "1"}
    assert compared([base] * 3) == [""] * 3
    assert compared([base]) == [""]
    told = compared([base, {**base, "train.lr": "0.2"}, base, {**base, "train.lr": "0.2", "torch": "2.12"}])
    words = "train.lr is 0.1 on ranks 0, 2 and 0.2 on ranks 1, 3; "
    assert told == [words + "torch is 2.13 on ranks 0, 1, 2 and 2.12 on rank 3"] * 4
    less = {k: v for k, v in base.items() if k != "torch"}
    assert compared([less, base])[0] == "torch is not there on rank 0 and 2.13 on rank 1"


def test_messages_stay_short() -> None:
    told = compared([{f"key{k}": f"{rank}" * 99 for k in range(9)} for rank in range(9)])
    assert len(set(told)) == 1 and len(told[0]) < 4000
    assert "and 3 other values" in told[0] and told[0].endswith("; and 3 more")


def test_a_rank_that_does_not_come_is_an_error_in_time() -> None:
    with pytest.raises(PolyrankError, match=r"rank 0 has waited 0\.2 s .* compare their facts"):
        check_same(dist.HashStore(), 0, 2, "facts", {}, 0.2)


def test_facts_are_the_same_wherever_they_are_made_and_name_what_runs() -> None:
    raw = small()
    facts = facts_of([("", draw_up(from_mapping(raw, CONFIGS), 2))])
    assert facts == facts_of([("", draw_up(from_mapping(raw, CONFIGS), 2))])
    assert facts["train.lr"] == "0.01" and facts["torch"].startswith("2.") and "sources of llm" in facts
    other = facts_of([("", draw_up(from_mapping({**raw, "layout": {"llm": {"tp": 2}}}, CONFIGS), 2))])
    assert {k for k in facts if other.get(k) != facts[k]} == {"the plan (a digest)"}
    assert {k for k in other if k not in facts} == {"layout.llm.tp"}
    assert not {"data.workers", "run.device"} & facts.keys()


def test_sources_are_told_apart_by_content_and_name(tmp_path: Path) -> None:
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text("x = 1\n")
    before = versions.digest(files)
    assert before == versions.digest(files) != versions.digest(files[:1])
    files[1].write_text("x = 2\n")
    assert before != versions.digest(files)


def start(argv: list[list[str]], port: int, package: str = "") -> Ended:
    """A rank with arguments of its own; package: of which the last rank has another version."""
    rank = dist.get_rank()
    theirs = {package: "0.1"} if rank == len(argv) - 1 else {}
    real = versions._version
    with mock.patch.object(versions, "_version", lambda name: theirs.get(name) or real(name)):
        return run_rank(argv[rank], port)


@pytest.mark.parametrize(
    ("last", "package", "code", "said"),
    [
        (["train.lr=0.5"], "", 2, "at the start: train.lr is 0.01 on ranks 0, 1 and 0.5 on rank 2;"),
        ([], "numpy", 2, " on ranks 0, 1 and 0.1 on rank 2; needed: one config, one code, the same packages"),
        (["data.context=97"], "", 2, "data.context is 96 on ranks 0, 1 and 97 on rank 2"),
        (["elsewhere"], "", 3, "data: shard 1 of the training data is sensor-000000.tar (9 samples, "),
    ],
    ids=["recipe", "package", "context", "data"],
)
def test_jobs_of_ranks_that_disagree(
    last: list[str], package: str, code: int, said: str, tmp_path: Path, ranks: Any
) -> None:
    configs = []
    for name, count in (("here", 9), ("elsewhere", 8)):
        folder = tmp_path / name
        folder.mkdir()
        write_shard(folder / "sensor-000000.tar", sensor_samples(count))
        configs.append(str(sensor_config(folder)))
    argv = ["train", configs[0], f"run.dir={tmp_path}/run", "train.steps=1"]
    theirs = [*argv, *last]
    if last == ["elsewhere"]:
        theirs = ["train", configs[1], *argv[2:]]
    ended: list[Ended] = ranks(3, start, [argv, argv, theirs], free_port(), package)
    err = "".join(e.err for e in ended)
    assert [e.code for e in ended] == [code] * 3, err
    # One message. Here the first rank hosts the store: once it has ended, others cannot tell that it spoke.
    assert said in err and len({line for line in err.splitlines() if "do not agree" in line}) == 1
    assert "Traceback" not in err
    assert not list((tmp_path / "run").glob("*.jsonl"))
