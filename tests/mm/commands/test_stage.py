"""One stage of a config, planned or compared: the command that trains under a layout says which."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest
import yaml

from mm.commands.command import one_config_of
from mm.commands.compare import typed
from mm.compare.entry import train_command
from mm.compare.variants import variants
from mm.config.schema import load_config
from mm.config.stages import stages_of
from mm.errors import Refused
from tests.mm.harness import small


def test_the_command_of_a_compared_stage_trains_it_under_its_layout(tmp_path: Path) -> None:
    raw = small(layout={"llm": {"tp": 2}})
    del raw["train"]["steps"]
    own = {"layout": {"llm": {"pp": 2}}, "schedule": {"kind": "gpipe", "microbatches": 2}}
    raw["stages"] = [{"name": "one", "steps": 1}, {"name": "two", "steps": 2, **own}]
    config, file = tmp_path / "c.yaml", tmp_path / "dp.yaml"
    config.write_text(yaml.safe_dump(raw))
    file.write_text(yaml.safe_dump({"layout": {"llm": {"ranks": "all"}}, "schedule": {"kind": "1f1b"}}))
    args = argparse.Namespace(positional=[str(config), "train.lr=0.5"], stage="two")
    (found,) = variants(one_config_of(args), [file])
    assert found.cfg.train.steps == 2 and found.cfg.train.lr == 0.5
    command = shlex.split(train_command(config, typed(args, []), found, 2))
    assert command[:5] == ["python", "-m", "mm", "train", str(config)] and command[-1] == "--nproc=2"
    assert "--stage=two" in command
    again = load_config(config, [word for word in command[5:] if not word.startswith("--")])
    (stage,) = stages_of(again, "two")
    assert stage.cfg.layout == found.cfg.layout and stage.cfg.schedule == found.cfg.schedule
    args.stage = None
    with pytest.raises(Refused, match="needed: --stage, one of one, two"):
        one_config_of(args)
