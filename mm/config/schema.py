"""The config: strict YAML, one section for each concern, each key with a type and a description.

An unknown key is refused with the nearest known one. `key=value` on the command line overrides a dotted key.
docs/config.md lists the keys with the descriptions given here (tested).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from mm.config.build import LONGEST_S, Line, Section, build, unknown_key
from mm.config.data import DataConfig
from mm.config.folder import FOLDER, unfold
from mm.config.remote import CopyConfig
from mm.config.sources import check_lengths, check_sources, moved
from mm.config.synthetic import check_synthetic
from mm.config.training import TrainConfig, check_train
from mm.data.remote.urls import all_public
from mm.errors import Refused
from mm.order.skips import Skips


class RunConfig(Section):
    """The run itself: its folder, its ranks and what it writes."""

    dir: Line = Field(
        "runs/run", min_length=1, description="folder that the run writes to, from the working folder"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the weights and of the samples' order")
    nproc: int = Field(4, ge=1, description="local ranks to start outside torchrun; --nproc overrides it")
    timeout_s: float = Field(
        120.0,
        gt=0,
        le=LONGEST_S,
        description="longest wait for another rank, and longest action of a step, in seconds",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cpu, cuda, or auto: CUDA where each local rank has a device"
    )
    node_size: int | None = Field(
        None,
        ge=1,
        description="ranks a node: ranks 0 to N-1 are one, the next N another; by default those that "
        "torchrun starts on a machine",
    )
    trace: int | None = Field(
        None, ge=1, description="number of a step to draw as it ran, with a trace for Perfetto"
    )
    engine: Literal["polyrank", "megatron"] = Field(
        "polyrank",
        description="the program that plan predicts, which is as a rule this one; train always runs this one",
    )
    tensorboard: bool = Field(False, description="write losses, norms, rates and lifts for TensorBoard too")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases that gets the same numbers"
    )
    unwritable: Literal["go_on", "stop"] = Field(
        "go_on",
        description="where metrics or log cannot be written any more (a full disk): go_on says so once and "
        "trains on, stop saves and ends",
    )
    report: bool = Field(
        False, description="write report.html when the run ends; report RUN does so at any time"
    )


class ProjectorConfig(Section):
    """The projector between an encoder and the language model."""

    kind: Literal["mlp", "linear", "none", "resampler"] = Field(
        "mlp",
        description="mlp: two linear maps; linear: one; none: features are as wide as the language model; "
        "resampler: learned queries attend to the features",
    )
    activation: Literal["relu2", "gelu", "gelu_tanh", "quick_gelu", "silu"] = Field(
        "relu2", description="between the projector's two linear maps"
    )
    bias: bool = Field(False, description="whether the projector's linear maps have a bias")
    norm: Literal["rms", "layer", "none"] = Field("rms", description="norm of the features before them")
    hidden: int = Field(256, ge=1, description="width between the projector's two linear maps")
    weights: str | None = Field(
        None, description="folder of a whole model (Llava and the like) with the projector's first weights"
    )
    queries: int = Field(64, ge=1, description="rows that a resampler makes of each item")
    depth: int = Field(3, ge=1, description="layers of a resampler")
    heads: int = Field(16, ge=1, description="attention heads of a resampler")
    kv_heads: int = Field(4, ge=1, description="heads of its keys and values, which divide them")
    head_dim: int = Field(96, ge=1, description="width of a head of a resampler")


class EncoderConfig(Section):
    """An encoder module."""

    encoder: str = Field(
        description="the encoder: vit, fastconformer, a published family, hf:FOLDER, a plug-in's name, or "
        "package.module:Class"
    )
    weights: str | None = Field(
        None,
        description="a Hugging Face folder: the encoder's first weights, and its options; a run that resumes "
        "has its own weights",
    )
    projector: ProjectorConfig = ProjectorConfig()
    freeze: Literal["none", "encoder", "projector", "all"] = Field(
        "none", description="weights that are not trained: none, encoder, projector or all"
    )
    freeze_layers: int = Field(
        0,
        ge=0,
        description="first layers of the encoder that are not trained, with what comes before them; 0: all "
        "are trained that freeze leaves",
    )
    deal: Literal["cost", "sample"] = Field(
        "cost", description="how items go to the encoder's dp ranks: balanced by cost, or with their sample"
    )
    options: dict[str, Any] = Field({}, description="the encoder's own options")


class ScheduleConfig(Section):
    """The order of a step's work."""

    kind: str = Field("auto", description="the schedule; auto follows placement, pp and vpp")
    ahead: int | None = Field(
        None,
        ge=1,
        description="micro-batches whose activations an encoder on the language model's ranks may hold; by "
        "default the fewest that keep the pipeline full",
    )
    encoder_batch: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="by encoder, the micro-batches that it computes at once; 1 by default"
    )
    overlap_experts: bool | Literal["auto"] = Field(
        False,
        description="expert exchanges of one micro-batch beside the computation of another, for up to "
        "twice the language model's activations; auto: where the simulated step is shorter",
    )
    microbatches: int = Field(
        1, ge=1, description="micro-batches that the global batch is split into, the same for all modules"
    )


class EvalConfig(Section):
    """Evaluation on held-out samples."""

    every: int = Field(0, ge=0, description="steps between evaluations, 0 for one at the end")
    samples: int = Field(96, ge=1, description="held-out samples that are evaluated")
    average: bool = Field(False, description="evaluate the average of the weights (train.average)")


class CheckpointConfig(Section):
    """Checkpoints, and where a run starts from."""

    every: int = Field(
        0, ge=0, description="steps between checkpoints, with one after the last step too; 0 for none"
    )
    keep: int = Field(2, ge=0, description="newest checkpoints that stay, 0 for all")
    keep_every: int = Field(
        0, ge=0, description="checkpoints of steps that this divides stay too; 0 for none"
    )
    keep_best: Literal["loss", "eval_loss"] | None = Field(
        None,
        description="the checkpoint with the lowest of this stays too: the loss of its step, or of an "
        "evaluation after it",
    )
    on_failure: Literal["end", "continue"] = Field(
        "end",
        description="what a run does when a checkpoint cannot be written (a full disk): end with exit code "
        "4, or warn and train on; the last one must be written in any case",
    )
    resume: str = Field(
        "auto",
        description="checkpoint to resume from: auto for the newest whole one of run.dir, if any, none, or a "
        "path",
    )
    weights: str | list[str] | None = Field(
        None,
        description="checkpoint or Hugging Face folder that a run that does not resume starts from; of a "
        "list, each module takes the first that has it",
    )

    remote: CopyConfig = CopyConfig()

    @property
    def starts(self) -> list[str]:
        """The folders of `weights`."""
        return [self.weights] if isinstance(self.weights, str) else self.weights or []


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: dict[str, EncoderConfig] = Field(description="encoder modules by name")
    llm: dict[str, Any] = Field(description="options of the language model")
    layout: dict[str, dict[str, Any]] = Field({}, description="by module, ranks and parallel degrees")
    elastic: dict[int | Literal["other"], str] = Field(
        {},
        description="by number of ranks, or other, the layout of a run that is started on so many: a layout "
        "file, from the config's folder, or plan:HARDWARE",
    )
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stages: list[dict[str, Any]] = Field(
        [],
        description="runs one after another, each from the weights of those before: name, steps, and what is "
        "different in it",
    )
    base: Path = Field(description="folder of the config file, where data paths start; not a key of the file")


INTERNAL = ("base", "llm")  # fields of Config that are not top-level keys of the file
LAYOUT_FILE = {"layout", "schedule"}  # what a layout file may hold


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply key=value overrides; raises Refused in words."""
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        near = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
        what = f"{path} is a folder, not a config file" if path.is_dir() else f"no config file {path}"
        raise Refused(f"{what}; there: {', '.join(near) or 'no .yaml files'}")
    raw = _read_yaml(path)
    if "layout" in raw and not raw.keys() - LAYOUT_FILE:
        raise Refused(f"{path} is a layout file; needed: a config, such as compare CONFIG --layouts {path}")
    for text in overrides:
        override(raw, text)
    return from_mapping(raw, path.resolve().parent)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML would silently keep the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"key {key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), _UniqueKeys)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise Refused(f"{path} cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise Refused(f"{path} is not a mapping of sections, such as layout: {{llm: {{tp: 2}}}}")
    return raw


def _one_line(error: Exception) -> str:
    """A YAML error's problem and position, without the excerpt, which would take several lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def from_mapping(raw: Mapping[str, Any], base: Path) -> Config:
    """A config from the mapping of its file, where `model` holds encoders and llm; base: the file's folder.

    Raises Refused.
    """
    rest = copy.deepcopy(dict(raw))
    model = rest.pop("model", None)
    if not isinstance(model, dict) or not isinstance(model.get("llm", model.get(FOLDER) and {}), dict):
        raise Refused(
            "the config has no model.llm section; needed: model: {llm: {..}, <encoder module>: {..}}, or "
            "model.folder, of a whole model"
        )
    if isinstance(model.get(FOLDER), str):
        unfold(rest, model)
    llm = model.pop("llm")
    sections = [k for k in Config.model_fields if k not in INTERNAL]
    for name in rest.keys() - sections:
        if name in ("llm", *model):
            raise Refused(f"unknown key {name}; did you mean model.{name}?")
        raise Refused(unknown_key(str(name), name, sections))
    _count_steps(rest)
    cfg = build(Config, {**rest, "model": model, "llm": llm, "base": base}, "")
    check_train(cfg.train, [*cfg.model], cfg.run.trace)
    check_sources(cfg.data.train, cfg.data.weights)
    check_lengths(cfg.data.lengths, cfg.data.context)
    if cfg.data.synthetic is not None:
        check_synthetic(cfg.data.synthetic, cfg.data.context, cfg.model)
    if cfg.data.pack is not None and cfg.data.pack < cfg.data.context:
        raise Refused(
            f"data.pack={cfg.data.pack} is shorter than the longest sample, data.context={cfg.data.context}; "
            f"nearest: data.pack={cfg.data.context}"
        )
    try:
        Skips.parse(cfg.data.skip)
    except ValueError as error:
        raise Refused(f"data.skip: {error}") from error
    if cfg.train.spike is not None and not cfg.checkpoint.every:
        raise Refused(
            "train.spike goes back to the last checkpoint, and checkpoint.every=0 writes none; nearest: "
            "checkpoint.every=100"
        )
    if cfg.checkpoint.keep_best == "eval_loss" and not (cfg.data.eval and cfg.eval.every):
        raise Refused(
            "checkpoint.keep_best=eval_loss, but nothing is evaluated while the run goes on; needed: "
            "data.eval and eval.every, or checkpoint.keep_best=loss"
        )
    if cfg.eval.average and cfg.train.average is None:
        raise Refused("eval.average, but no average is kept; needed: train.average, such as 0.999")
    return cfg


def _count_steps(raw: dict[str, Any]) -> None:
    """train.steps of a config with stages: theirs together."""
    stages, train = raw.get("stages"), raw.get("train")
    if not stages or not isinstance(stages, list) or not isinstance(train, dict):
        return
    steps = [s.get("steps") for s in stages if isinstance(s, dict)]
    total = max(1, sum(n for n in steps if isinstance(n, int)))  # a stage without steps is named later
    if train.setdefault("steps", total) != total:
        raise Refused(
            f"train.steps is {train['steps']}, but the config has stages, of {total} steps together; needed: "
            "steps of each stage, and no train.steps"
        )


def override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise Refused(f"override {text!r} is not key=value, such as train.lr=0.001")
    at = raw
    for name in path[:-1]:
        if at.get(name) is None:  # the section is absent or empty in the file
            at[name] = {}
        at = at[name]
        if not isinstance(at, dict):
            raise Refused(f"override {text!r}: {name} is a value, not a section")
    try:
        at[path[-1]] = yaml.safe_load(value)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise Refused(f"override {text!r}: {value!r} is not YAML: {_one_line(error)}") from error


def resolve(cfg: Config) -> dict[str, Any]:
    """The whole config as plain data, defaults filled in, in the shape of the YAML file."""
    raw = cfg.model_dump(mode="json", exclude={"base", "llm"})
    raw["model"]["llm"] = dict(cfg.llm)
    return raw


def shown(cfg: Config) -> dict[str, Any]:
    """resolve() as files may have it: no URL has a password or a signature."""
    raw: dict[str, Any] = all_public(resolve(cfg))
    return raw


def resolve_yaml(cfg: Config) -> str:
    """resolve() as the text of a YAML file in run.dir, where its data paths start: the file can be run.

    No URL has a password or a signature.
    """
    raw = resolve(cfg)
    for name, entries in (("train", cfg.data.train), ("eval", cfg.data.eval)):
        raw["data"][name] = moved(entries, lambda p: os.path.relpath(cfg.base / p, cfg.run.dir))
    return yaml.safe_dump(all_public(raw), sort_keys=False)


def load_layout_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(layout, schedule) of a layout file, which holds those two mappings and nothing else."""
    if not path.is_file():
        raise Refused(f"no layout file {path}")
    raw = _read_yaml(path)
    if "layout" not in raw:
        raise Refused(f"layout file {path} has no layout: mapping")
    for key, value in raw.items():
        if key not in ("layout", "schedule"):
            raise Refused(f"{path}: {unknown_key(key, key, ['layout', 'schedule'])}")
        if not isinstance(value, dict | None):
            raise Refused(f"{path}: {key} is {value!r}; needed: a mapping")
    return raw["layout"] or {}, raw.get("schedule") or {}


def with_layout(cfg: Config, layout: Mapping[str, Any], schedule: Mapping[str, Any]) -> Config:
    """The same run under another layout."""
    raw = resolve(cfg)
    raw["layout"] = dict(layout)
    raw["schedule"] = {**raw["schedule"], **schedule}
    return from_mapping(raw, cfg.base)
