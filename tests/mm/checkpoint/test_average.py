"""Checkpoints are averaged tensor by tensor, into one that runs start from."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mm import cli
from mm.checkpoint.average import Mean, average_checkpoints
from mm.errors import CheckpointError
from parallel import checkpoint as store
from tests.mm.checkpoint.runs import contents, written


@pytest.mark.parametrize("shares", [None, [1.0, 0.0, 3.0]])
def test_it_is_the_weighted_mean_and_holds_one_tensor_at_a_time(tmp_path: Path, shares: Any) -> None:
    paths = [written(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    read, made = Mean.__call__, []
    last: list[Any] = [lambda: None]

    def one(self: Mean, name: str) -> torch.Tensor:
        assert last[0]() is None, "the tensor before is written and gone"
        made.append(name)
        found = read(self, name)
        last[0] = weakref.ref(found)
        return found

    with mock.patch.object(Mean, "__call__", one):
        average_checkpoints(tmp_path / "out", paths, shares)
    assert sorted(made) == ["llm.count", "llm.head", "llm.scale"], "each once, and no optimizer state"
    out = tmp_path / "out" / "step-00000003"
    assert not store.verify(out) and store.read_state(out) == {
        "step": 3,
        "format": 1,
        "config": {"of": 3, "data": {}},
    }
    found, given = contents(out), [contents(path) for path in paths]
    weights = [1 / 3] * 3 if shares is None else [0.25, 0.0, 0.75]
    assert int(found.pop("llm.count")) == 3
    for name, value in found.items():
        mean = sum(w * c[name].double() for w, c in zip(weights, given, strict=True))
        assert isinstance(mean, torch.Tensor)
        torch.testing.assert_close(value, mean.to(value.dtype), rtol=1e-6, atol=1e-7)


def test_what_cannot_be_averaged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = written(tmp_path / "1", 1), written(tmp_path / "2", 2)
    other = written(tmp_path / "3", 3, **{"llm.more": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"another model than .* 1 tensors differ .* first llm\.more"):
        average_checkpoints(tmp_path / "out", [one, other])
    with pytest.raises(CheckpointError, match=r"weights \[1.0\]; needed: one for each"):
        average_checkpoints(tmp_path / "out", [one, two], [1.0])
    given = [str(path) for path in (tmp_path / "out", one, two)]
    assert cli.main(["checkpoint", "average", *given, "--shares", "1", "2"]) == 0
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    for shares in (["nan", "1"], ["inf", "1"]):
        assert cli.main(["checkpoint", "average", *given, "--shares", *shares]) == 4
        assert "finite, not negative, not all zero" in capsys.readouterr().err
    for folder, words in ((one, f"{one} is a checkpoint"), (one / "in", f"{one} is a checkpoint")):
        assert cli.main(["checkpoint", "average", str(folder), str(two)]) == 4  # OUT was left out
        assert words in capsys.readouterr().err and not store.verify(one)
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["checkpoint", "average", str(tmp_path), str(two)]) == 4
    assert "is the folder of a run" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="has a checkpoint of step 2"):
        average_checkpoints(tmp_path / "out", [one, two])
    (one / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        average_checkpoints(tmp_path / "again", [one, two])
