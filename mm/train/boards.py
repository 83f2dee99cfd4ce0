"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, by the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml

from mm.config.schema import Config, resolve_yaml
from mm.data.remote.urls import all_public
from mm.errors import Refused

WANDB_ID = "wandb.id"  # file in the run's folder: a run that resumes goes on in the same run of W&B


class Board(Protocol):
    """Takes numbers by name."""

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""

    def went_back(self, step: int) -> None:
        """Hide what was written of steps after this one: the run takes them again."""

    def close(self) -> None:
        """Write what is left."""


def open_boards(cfg: Config, run_dir: Path, first: int) -> list[Board]:
    """The boards that a config asks for. first: steps done before. Raises Refused where one cannot open."""
    out: list[Board] = [TensorBoard(run_dir, first)] if cfg.run.tensorboard else []
    if cfg.run.wandb is not None:
        out.append(WeightsAndBiases(cfg.run.wandb, run_dir, first, yaml.safe_load(resolve_yaml(cfg))))
    return out


class TensorBoard:
    """TensorBoard's files in `run_dir`/tensorboard. It hides what was written of steps after `first`."""

    def __init__(self, run_dir: Path, first: int) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._begin(first)

    def _begin(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(self._folder, purge_step=first + 1)

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def went_back(self, step: int) -> None:
        """Hide what was written of steps after this one."""
        self._writer.close()  # a file says where it begins in its first lines
        self._begin(step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files are in `run_dir`/wandb.

    Its own settings hold: WANDB_MODE=offline sends nothing, and `wandb sync` does so later. Steps are a
    metric of ours: those of W&B cannot go back, and a run that resumes repeats some. Raises Refused where it
    cannot begin.
    """

    def __init__(self, project: str, run_dir: Path, first: int, config: Mapping[str, Any]) -> None:
        import wandb

        kept = run_dir / WANDB_ID
        before = kept.read_text().strip() if first and kept.exists() else None
        try:
            self._run: Any = wandb.init(
                project=project,
                dir=str(run_dir),
                name=run_dir.name,
                id=before or None,
                resume="allow" if before else None,
                config=all_public(config),
                settings=wandb.Settings(console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise Refused(
                f"run.wandb={project}: {error}; needed: `wandb login`, or WANDB_MODE=offline, which writes "
                f"to {run_dir / 'wandb'} alone, or no run.wandb (metrics.jsonl has the same numbers)"
            ) from error
        kept.write_text(f"{self._run.id}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step."""
        self._run.log({**values, "step": step})

    def went_back(self, step: int) -> None:
        """Mark it: what was sent cannot be taken back, and stays beside the values that follow."""
        self._run.log({"went_back": 1.0, "step": step})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
