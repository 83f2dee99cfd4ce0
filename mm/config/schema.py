"""The config: strict YAML, one section a concern, every key with a type.

An unknown key is refused with the nearest known one. `key=value` on the command line overrides a dotted key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mm.errors import Refused


class Section(BaseModel):
    """A frozen section that knows its keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    """dir: where the run writes, relative to the working folder; timeout_s bounds every wait; trace: number
    of a step that is drawn as it ran, and traced for Perfetto; tensorboard: write the numbers for it too.
    """

    dir: str = Field("runs/run", min_length=1)
    seed: int = Field(0, ge=0, lt=2**63)
    nproc: int = Field(4, ge=1)
    timeout_s: float = Field(120.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trace: int | None = Field(None, ge=1)
    tensorboard: bool = False


class ProjectorConfig(Section):
    """hidden: width between the projector's two linear maps."""

    hidden: int = Field(256, ge=1)


class EncoderConfig(Section):
    """encoder: a registered name or package.module:Class; options: the encoder's own.

    deal: how items go to the encoder's dp ranks, balanced by cost or by their sample's place.
    """

    encoder: str
    projector: ProjectorConfig = ProjectorConfig()
    freeze: Literal["none", "encoder", "projector", "all"] = "none"
    deal: Literal["cost", "sample"] = "cost"
    options: dict[str, Any] = {}


class ScheduleConfig(Section):
    """kind: auto follows placement, pp and vpp. microbatches: how many the global batch is cut into, the same
    for all modules. ahead: for how many of them an encoder on the language model's ranks may hold
    activations; as few as keep the pipeline full where it is not given. encoder_batch: by encoder, for how
    many micro-batches it computes at once (1).
    """

    kind: str = "auto"
    ahead: int | None = Field(None, ge=1)
    encoder_batch: dict[str, Annotated[int, Field(ge=1)]] = {}
    microbatches: int = Field(1, ge=1)


class DataConfig(Section):
    """train, eval: shard patterns relative to the config file; made_by: the command that makes those shards,
    for errors; context: longest sample in tokens.

    overlong, misfit: what becomes of samples that are longer, and of those with an item that its encoder
    cannot take; max_skipped: the largest share of samples that may be lost or left out.
    """

    train: list[str] = Field(min_length=1)
    eval: list[str] = []
    made_by: str | None = None
    overlong: Literal["refuse", "skip", "truncate"] = "refuse"
    misfit: Literal["refuse", "skip"] = "refuse"
    max_skipped: float = Field(0.01, ge=0, le=1)
    tokenizer: str = "bytes"
    context: int = Field(256, ge=3)
    prefetch: int = Field(2, ge=1)


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """warmup, decay: fractions of steps, together at most 1. min_lr: at most lr. clip: bound on the global
    gradient norm, 0 for none.

    shard: FSDP gathers each module as a whole, or layer by layer. recompute: true for whole layers, or parts
    of them by name (llm.recompute); encoders know whole layers only. offload: the language model's
    activations of at least so many bytes wait on the host.
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)
    decay: float = Field(0.2, ge=0, le=1)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)
    recompute: bool | str | list[str] = False
    offload: int | None = Field(None, ge=1)
    shard: Literal["module", "layer"] = "module"


class EvalConfig(Section):
    """every: steps between evaluations, 0 for one at the end; samples: how many held-out samples."""

    every: int = Field(0, ge=0)
    samples: int = Field(96, ge=1)


class CheckpointConfig(Section):
    """every: steps between checkpoints, 0 for none; keep: how many stay; resume: auto, none or a path;
    weights: what a run that does not resume starts from, a Hugging Face folder or a checkpoint.
    """

    every: int = Field(0, ge=0)
    keep: int = Field(2, ge=0)
    resume: str = "auto"
    weights: str | None = None


class Config(Section):
    """A whole run. model: encoder modules by name; llm: the language model's options (llm.LLMConfig).

    base: folder of the config file, which data paths are relative to.
    """

    run: RunConfig = RunConfig()
    model: dict[str, EncoderConfig]
    llm: dict[str, Any]
    layout: dict[str, dict[str, Any]] = {}
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    base: Path


INTERNAL = ("base", "llm")  # fields of Config that are no top-level keys of the file
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
        _override(raw, text)
    return from_mapping(raw, path.resolve().parent)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""

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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read as YAML: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise Refused(f"{path} is not a mapping of sections, such as layout: {{llm: {{tp: 2}}}}")
    return raw


def _one_line(error: Exception) -> str:
    """A YAML error's problem and place, without the excerpt that would take several lines."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def from_mapping(raw: Mapping[str, Any], base: Path) -> Config:
    """A config from its YAML mapping, in which `model` holds the encoders and llm together."""
    rest = copy.deepcopy(dict(raw))
    model = rest.pop("model", None)
    if not isinstance(model, dict) or not isinstance(model.get("llm"), dict):
        raise Refused(
            "the config has no model.llm section; needed: model: {llm: {..}, <encoder module>: {..}}"
        )
    llm = model.pop("llm")
    sections = [k for k in Config.model_fields if k not in INTERNAL]
    for name in rest.keys() - sections:
        if name in ("llm", *model):
            raise Refused(f"unknown key {name}; did you mean model.{name}?")
        raise Refused(_unknown(str(name), name, sections))
    cfg = build(Config, {**rest, "model": model, "llm": llm, "base": base}, "")
    _check_train(cfg)
    return cfg


def _check_train(cfg: Config) -> None:
    """Refuse values that are each legal, but not together."""
    train, trace = cfg.train, cfg.run.trace
    if train.min_lr > train.lr:
        raise Refused(f"train.min_lr is {train.min_lr}; needed: at most train.lr, {train.lr}")
    if train.warmup + train.decay > 1:
        rest = round(1 - train.warmup, 6)
        rest -= 1e-6 * (train.warmup + rest > 1)  # in few digits, and never too much
        raise Refused(
            f"train.warmup={train.warmup} and train.decay={train.decay} are fractions of the steps; needed: "
            f"together at most 1; nearest: train.decay={rest:.6g}"
        )
    if train.min_lr > 0 and train.decay == 0:
        raise Refused(
            f"train.min_lr={train.min_lr} is where the rate goes down to, but train.decay=0 leaves it as it "
            "is, so it would have no effect; nearest: train.min_lr=0"
        )
    if trace is not None and trace > train.steps:
        raise Refused(f"run.trace is {trace}; needed: a step of the run, at most train.steps={train.steps}")


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise Refused(f"override {text!r} is not key=value, such as train.lr=0.001")
    at = raw
    for name in path[:-1]:
        if at.get(name) is None:  # a section that is absent, or empty in the file
            at[name] = {}
        at = at[name]
        if not isinstance(at, dict):
            raise Refused(f"override {text!r}: {name} is a value, not a section")
    try:
        at[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise Refused(f"override {text!r}: {value!r} is not YAML: {_one_line(error)}") from error


# Both are slow to make, and advice builds many configs.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def build(kind: type[Any], mapping: Mapping[str, Any], path: str) -> Any:
    """Build a frozen dataclass or a section strictly from a mapping; `path` is its dotted place, for errors.

    Raises Refused naming the key, what was given and, for an unknown key, the nearest known one.
    """
    _check_keys(kind, mapping, path)
    try:
        return _adapter(kind).validate_python(dict(mapping))
    except ValidationError as error:
        raise Refused("; ".join(_explain(e, path, mapping) for e in error.errors())) from None


NUMBERS = (int, float, int | None, float | None)


def _check_keys(kind: Any, value: Any, path: str) -> None:
    """Refuse keys that a dataclass or section, or one inside it, does not know, and true for a number.

    Dataclasses would ignore keys, sections would not name the nearest known one, and both take true for 1.
    """
    if isinstance(value, bool) and kind in NUMBERS:
        raise Refused(f"{path}: given {value}; needed: a number")
    if not isinstance(value, Mapping):
        return
    if getattr(kind, "__origin__", None) is dict:
        for key, inner in value.items():
            _check_keys(get_args(kind)[-1], inner, _join(path, key))
        return
    if not (dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, Section))):
        return
    hints = _hints(kind)
    known = _known_keys(kind)
    for key, inner in value.items():
        if key not in known:
            raise Refused(_unknown(_join(path, key), key, known))
        _check_keys(hints[key], inner, _join(path, key))


def _known_keys(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind)]
    return list(kind.model_fields)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unknown(where: str, key: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key).lower(), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {where}; {hint}"


def _explain(error: Any, path: str, mapping: Mapping[str, Any]) -> str:
    loc = error["loc"]
    where = path
    for name in loc:
        where = _join(where, name)
    if error["type"] != "missing":
        return f"{where}: given {error['input']!r}; {_needed(error['msg'])}"
    if len(loc) == 3 and loc[0] == "model":  # a mistyped module in an override looks like a new module
        others = [m for m in mapping["model"] if m != loc[1] and "encoder" in mapping["model"][m]]
        near = difflib.get_close_matches(loc[1], others, 1)
        return f"{where} is missing" + (f"; did you mean model.{near[0]}?" if near else "")
    return f"{where} is missing"


def _needed(message: str) -> str:
    """A validator's message in our words: what is needed, without the names of classes."""
    message = message.replace("a valid dictionary or instance of ", "a mapping, of ").partition(", of ")[0]
    for theirs, ours in (
        ("Input should be", "needed:"),
        ("a valid dictionary", "a mapping"),
        ("a valid ", "a "),
    ):
        message = message.replace(theirs, ours)
    return "needed: at least one" if message.startswith("List should have at least 1") else message


def resolve(cfg: Config) -> dict[str, Any]:
    """The whole config as plain data, defaults filled in, in the shape of the YAML file."""
    raw = cfg.model_dump(mode="json", exclude={"base", "llm"})
    raw["model"]["llm"] = dict(cfg.llm)
    return raw


def resolve_yaml(cfg: Config) -> str:
    """resolve() as the YAML text of a file in run.dir: its data paths start there, so that it runs again."""
    raw = resolve(cfg)
    for name in ("train", "eval"):
        raw["data"][name] = [os.path.relpath(cfg.base / p, cfg.run.dir) for p in raw["data"][name]]
    return yaml.safe_dump(raw, sort_keys=False)


def load_layout_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(layout, schedule) of a layout file, which holds those two mappings and nothing else."""
    if not path.is_file():
        raise Refused(f"no layout file {path}")
    raw = _read_yaml(path)
    if "layout" not in raw:
        raise Refused(f"layout file {path} has no layout: mapping")
    for key, value in raw.items():
        if key not in ("layout", "schedule"):
            raise Refused(f"{path}: {_unknown(key, key, ['layout', 'schedule'])}")
        if not isinstance(value, dict | None):
            raise Refused(f"{path}: {key} is {value!r}; needed: a mapping")
    return raw["layout"] or {}, raw.get("schedule") or {}


def with_layout(cfg: Config, layout: Mapping[str, Any], schedule: Mapping[str, Any]) -> Config:
    """The same run under another layout."""
    raw = resolve(cfg)
    raw["layout"] = dict(layout)
    raw["schedule"] = {**raw["schedule"], **schedule}
    return from_mapping(raw, cfg.base)
