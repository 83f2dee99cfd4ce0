"""Stages of a training run: what each trains, on what data, in which layout. Pure, no torch.

A stage is a run of its own, in a folder of its own, which starts from the weights that the stages before it
have left. Its optimizer and its learning rate start anew, as in the published recipes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm.config.build import unknown_key
from mm.config.schema import Config, from_mapping, resolve
from mm.config.training import TrainConfig
from mm.errors import Refused, of_stage

SECTIONS = ("layout", "schedule", "data", "eval", "checkpoint")  # of which a stage may change keys
OWN = ("name", "train", "modules", "freeze_layers")  # keys that only a stage has
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SINK = "llm"


class Stage(NamedTuple):
    """name: "" for a config without stages. cfg: of its run. before: folders of the stages before it."""

    name: str
    cfg: Config
    before: tuple[Path, ...]


def stages_of(cfg: Config, only: str | None = None) -> list[Stage]:
    """The runs that a config consists of, in order; itself where it has no stages.

    only: the name of the one stage that is wanted. Raises Refused, which names the stage.
    """
    if not cfg.stages:
        if only is not None:
            raise Refused(f"--stage {only}, but the config has no stages; needed: a config with stages: [..]")
        return [Stage("", cfg, ())]
    names = [_name(k, given) for k, given in enumerate(cfg.stages)]
    for k, name in enumerate(names):
        if name in names[:k]:
            raise Refused(f"stages: {name} is the name of two stages; needed: a name for each")
    if only is not None and only not in names:
        raise Refused(unknown_key(only, only, names).replace("key", "stage", 1))
    folders = [Path(cfg.run.dir) / name for name in names]
    out = []
    for k, (name, given) in enumerate(zip(names, cfg.stages, strict=True)):
        with of_stage(name):
            out.append(Stage(name, _config(cfg, name, given), tuple(folders[:k])))
            _check_adapters(out)
    return [stage for stage in out if only in (None, stage.name)]


def _check_adapters(stages: list[Stage]) -> None:
    """Refuse a last stage without the adapters that an earlier one leaves: they are part of its weights."""
    now = stages[-1].cfg
    for before in stages[:-1]:
        for module, lora in before.cfg.train.lora.items():
            if module in (SINK, *now.model) and now.train.lora.get(module) != lora:
                raise Refused(
                    f"stage {before.name} has train.lora.{module}, this one has other adapters or none; "
                    "needed: the same, or a run of its own from weights that `checkpoint export` has merged"
                )


def _name(k: int, given: Mapping[str, Any]) -> str:
    name = given.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(f"stage {k + 1} of stages has name {name!r}; needed: letters, digits, _, - and .")
    return name


def _config(cfg: Config, name: str, given: Mapping[str, Any]) -> Config:
    """The config of a stage's run."""
    raw = resolve(cfg)
    del raw["stages"]
    raw["run"]["dir"] = str(Path(cfg.run.dir) / name)
    modules = _parts("modules", given.get("modules", [*cfg.model]), [*cfg.model])
    for gone in cfg.model.keys() - set(modules):
        _without(raw, gone)
    recipe = TrainConfig.model_fields
    for key, value in given.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise Refused(f"{key} is {value!r}; needed: a mapping")
            raw[key].update(copy.deepcopy(value))
        elif key in recipe:
            raw["train"][key] = value
        elif key not in OWN:
            raise Refused(unknown_key(key, key, [*OWN, *SECTIONS, *recipe]))
    if "steps" not in given:
        raise Refused("it has no steps; needed: steps: N")
    remote = raw["checkpoint"]["remote"]
    if remote == resolve(cfg)["checkpoint"]["remote"] and remote["url"] is not None:
        remote["url"] = f"{remote['url'].rstrip('/')}/{name}"  # like run.dir
    _freeze_layers(raw, given.get("freeze_layers", {}))
    _freeze(raw, given.get("train"))
    if not raw["checkpoint"]["every"]:  # the next stage needs the last one
        raw["checkpoint"]["every"] = raw["train"]["steps"]
    return from_mapping(raw, cfg.base)


def _without(raw: dict[str, Any], module: str) -> None:
    """Leave out an encoder that a stage lacks."""
    del raw["model"][module]
    raw["layout"].pop(module, None)
    raw["schedule"]["encoder_batch"].pop(module, None)
    for key in ("lr_by", "layer_decay", "lora"):
        kept = {k: v for k, v in raw["train"][key].items() if k.partition(".")[0] != module}
        raw["train"][key] = kept


def _freeze_layers(raw: dict[str, Any], given: Any) -> None:
    """So many first layers of each encoder in `given` are frozen; the model's own keys hold for others."""
    if not isinstance(given, dict):
        raise Refused(f"freeze_layers is {given!r}; needed: a mapping, such as {{vision: 12}}")
    encoders = [m for m in raw["model"] if m != SINK]
    for m in _parts("freeze_layers", [*given], encoders):
        raw["model"][m]["freeze_layers"] = given[m]


def _freeze(raw: dict[str, Any], trained: Any) -> None:
    """Freeze all but the parts in `trained`; None leaves it to the model's own keys."""
    if trained is None:
        return
    encoders = [m for m in raw["model"] if m != SINK]
    known = [SINK, *encoders, *(f"{m}.{part}" for m in encoders for part in ("encoder", "projector"))]
    parts = _parts("train", trained, known)
    if not parts:
        raise Refused(f"train is empty; needed: parts to train, of {', '.join(known)}")
    for m in encoders:
        learns = [m in parts or f"{m}.{part}" in parts for part in ("encoder", "projector")]
        raw["model"][m]["freeze"] = {
            (True, True): "none",
            (False, True): "encoder",
            (True, False): "projector",
            (False, False): "all",
        }[learns[0], learns[1]]
        if not learns[0]:
            raw["model"][m]["freeze_layers"] = 0  # all of its layers are frozen
    raw["model"][SINK]["freeze"] = SINK not in parts


def _parts(key: str, given: Any, known: list[str]) -> list[str]:
    """A list of names, each known."""
    if not isinstance(given, list) or not all(isinstance(part, str) for part in given):
        raise Refused(f"{key} is {given!r}; needed: a list of {', '.join(known)}")
    for part in given:
        if part not in known:
            raise Refused(unknown_key(f"{key}: {part}", part, known))
    return given
