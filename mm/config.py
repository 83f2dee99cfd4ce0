"""The config: strict YAML, one section a concern, every key with a type.

An unknown key is refused with the nearest known one. `key=value` on the command line overrides a dotted key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mm.errors import Refused


class Section(BaseModel):
    """A frozen section that knows its keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Section):
    """dir: where the run writes, relative to the working folder; timeout_s bounds every wait."""

    dir: str = "runs/run"
    seed: int = 0
    nproc: int = Field(4, ge=1)
    timeout_s: float = Field(120.0, gt=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ProjectorConfig(Section):
    """hidden: width between the projector's two linear maps."""

    hidden: int = Field(256, ge=1)


class EncoderConfig(Section):
    """encoder: a registered name or package.module:Class; options: the encoder's own.

    deal: how items go to the encoder's dp ranks, by their sample's place or balanced by cost.
    """

    encoder: str
    projector: ProjectorConfig = ProjectorConfig()
    freeze: Literal["none", "encoder", "projector", "all"] = "none"
    deal: Literal["sample", "cost"] = "sample"
    options: dict[str, Any] = {}


class ScheduleConfig(Section):
    """microbatches: how many the global batch is cut into, the same for all modules."""

    kind: Literal["auto", "colocated"] = "auto"
    microbatches: int = Field(1, ge=1)


class DataConfig(Section):
    """train, eval: shard patterns relative to the config file; context: longest sample in tokens."""

    train: list[str]
    eval: list[str] = []
    tokenizer: str = "bytes"
    context: int = Field(256, ge=3)
    prefetch: int = Field(2, ge=1)


class TrainConfig(Section):
    """warmup, decay: fractions of steps; clip: bound on the global gradient norm, 0 for none.

    shard: FSDP gathers each module as a whole, or layer by layer.
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, le=1)
    decay: float = Field(0.2, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)
    recompute: bool = False
    shard: Literal["module", "layer"] = "module"


class EvalConfig(Section):
    """every: steps between evaluations, 0 for one at the end; samples: how many held-out samples."""

    every: int = Field(0, ge=0)
    samples: int = Field(96, ge=1)


class CheckpointConfig(Section):
    """every: steps between checkpoints, 0 for none; keep: how many stay; resume: auto, none or a path."""

    every: int = Field(0, ge=0)
    keep: int = Field(2, ge=0)
    resume: str = "auto"


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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply key=value overrides; raises Refused in words."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise Refused(f"no config file {path}; there: {', '.join(near) or 'no .yaml files'}") from None
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise Refused(f"{path} is not a mapping of sections (run, model, layout, data, train, ..)")
    for text in overrides:
        _override(raw, text)
    return from_mapping(raw, path.resolve().parent)


def from_mapping(raw: Mapping[str, Any], base: Path) -> Config:
    """A config from its YAML mapping, in which `model` holds the encoders and llm together."""
    rest = copy.deepcopy(dict(raw))
    model = rest.pop("model", None)
    if not isinstance(model, dict) or not isinstance(model.get("llm"), dict):
        raise Refused(
            "the config has no model.llm section; needed: model: {llm: {..}, <encoder module>: {..}}"
        )
    llm = model.pop("llm")
    for reserved in ("llm", "base"):
        if reserved in rest:
            raise Refused(f"unknown key {reserved}; did you mean model.{reserved}?")
    return build(Config, {**rest, "model": model, "llm": llm, "base": base}, "")


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Refused(f"override {text!r} is not key=value, such as train.lr=0.001")
    at: Any = raw
    path = key.split(".")
    for name in path[:-1]:
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            raise Refused(f"override {text!r}: {name} is a value, not a section")
    try:
        at[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise Refused(f"override {text!r}: {value!r} is not YAML: {error}") from error


def build(kind: type[Any], mapping: Mapping[str, Any], path: str) -> Any:
    """Build a frozen dataclass or a section strictly from a mapping; `path` is its dotted place, for errors.

    Raises Refused naming the key, what was given and, for an unknown key, the nearest known one.
    """
    if dataclasses.is_dataclass(kind):
        known = [f.name for f in dataclasses.fields(kind)]
        for key in mapping:
            if key not in known:
                raise Refused(_unknown(f"{path}.{key}", key, known))
    try:
        return TypeAdapter(kind).validate_python(dict(mapping))
    except ValidationError as error:
        raise Refused("; ".join(_explain(kind, e, path) for e in error.errors())) from None


def _unknown(where: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {where}; {hint}"


def _explain(kind: type[Any], error: Any, path: str) -> str:
    where = ".".join([*([path] if path else []), *(str(p) for p in error["loc"])])
    where = f"model.{where}" if where.startswith("llm") and not path else where
    if error["type"] == "extra_forbidden":
        return _unknown(where, str(error["loc"][-1]), _keys_at(kind, error["loc"][:-1]))
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: given {error['input']!r}; {error['msg']}"


def _keys_at(kind: Any, loc: Sequence[Any]) -> list[str]:
    """Keys that the section at `loc` below `kind` knows."""
    for name in loc:
        field = kind.model_fields.get(name) if hasattr(kind, "model_fields") else None
        annotation = field.annotation if field is not None else kind
        arguments = getattr(annotation, "__args__", ())
        kind = arguments[-1] if arguments and field is None else annotation
        if getattr(kind, "__origin__", None) is dict:
            continue
    if getattr(kind, "__origin__", None) is dict:
        kind = kind.__args__[-1]
    return list(getattr(kind, "model_fields", {}))


def resolve(cfg: Config) -> dict[str, Any]:
    """The whole config as plain data, defaults filled in, in the shape of the YAML file."""
    raw = cfg.model_dump(mode="json", exclude={"base", "llm"})
    raw["model"]["llm"] = dict(cfg.llm)
    return raw


def resolve_yaml(cfg: Config) -> str:
    """resolve() as YAML text."""
    return yaml.safe_dump(resolve(cfg), sort_keys=False)


def load_layout_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(layout, schedule) of a layout file, which holds those two mappings and nothing else."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"layout file {path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or "layout" not in raw:
        raise Refused(f"layout file {path} has no layout: mapping")
    for key in raw:
        if key not in ("layout", "schedule"):
            raise Refused(_unknown(key, key, ["layout", "schedule"]))
    return raw["layout"] or {}, raw.get("schedule") or {}


def with_layout(cfg: Config, layout: Mapping[str, Any], schedule: Mapping[str, Any]) -> Config:
    """The same run under another layout."""
    raw = resolve(cfg)
    raw["layout"] = dict(layout)
    raw["schedule"] = {**raw["schedule"], **schedule}
    return from_mapping(raw, cfg.base)
