"""`checkpoint verify` says whether files are whole, and whether weights are finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm.cli import main
from tests.mm.checkpoint.runs import written

INF, NAN = torch.tensor([1.0, -torch.inf]), torch.tensor([[0.0], [torch.nan]])


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({}, 0, "step-00000001: whole\n"),
        ({"llm.mask": INF}, 0, "whole; infinities in llm.mask, which may be masks"),
        ({"llm.mask": NAN, "llm.a": NAN}, 5, "2 of 7 tensors are not finite: llm.a, llm.mask. A run passes"),
        (
            {"llm.w.x": INF, "llm.muon.w.x.momentum": INF * 0 + 1},
            5,
            "not finite: llm.muon.w.x.momentum, llm.w.x.",
        ),
        ({"llm.adam.w.exp_avg": INF}, 5, "1 of 6 tensors are not finite: llm.adam.w.exp_avg."),
    ],
)
def test_it_says_what_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, torch.Tensor], code: int, words: str
) -> None:
    """Infinities of what is not trained may be a mask; a run resumes from it."""
    path = written(tmp_path, 1, **more)
    assert main(["checkpoint", "verify", str(path)]) == code
    said = capsys.readouterr()
    assert words in (said.err if code else said.out) and "Traceback" not in said.err
