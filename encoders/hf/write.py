"""Encoders written back: config.json, settings of the processor and tensors of a published family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from encoders.contract import Encoder
from encoders.hf.family import Family, Part
from encoders.hf.folder import FAMILIES, PREPROCESSOR, VIDEO_PREPROCESSOR, family_name, make_config
from encoders.hf.said import SAID
from encoders.hf.saying import Said
from encoders.vision.config import Pictures
from parallel.published import FileTensor, SafeFolder, Shape, file_tensors, module_shapes
from parallel.topology.axis import Axes

# What a folder does not say: how features are taken from the last layer.
TAKEN = ("final_norm", "prefix_rows", "merge", "levels")


@dataclass(frozen=True)
class Written:
    """An encoder as a folder of its family has it, without the values.

    config: its own config.json, or its section of a whole model's. processors: preprocessor_config.json, and
    that of videos where the family has one, by name.
    tensors: by keys without a prefix, of the encoder's parameters. shapes: of these, by name.
    rest: by key, shape and value of what its class has and ours does not: it changes no feature.
    stem: what published folders put before the keys of `tensors`; those of `rest` have it.
    """

    family: Family
    config: Mapping[str, Any]
    processors: Mapping[str, Mapping[str, Any]]
    tensors: list[FileTensor]
    shapes: Mapping[str, Shape]
    rest: Mapping[str, tuple[Shape, float | tuple[float, ...]]]
    stem: str


def written(cls: type[Encoder], cfg: Any) -> Written:
    """An encoder of these options as its family writes it.

    Raises ValueError where it is of no family that can be written, or its config.json cannot say an option.
    """
    family, said = _family_of(cls)
    config, processor, video = said.config(cfg), said.processor(cfg), said.video(cfg)
    shapes = module_shapes(cls(cfg, Axes(), device="meta", dtype=None))
    rows = family.rows(cfg)
    unknown = sorted(shapes.keys() - {here + name for row, _, here in rows for name in row.ours})
    if unknown:
        raise ValueError(f"a {config['model_type']} folder has no tensor for {', '.join(unknown)}")
    tensors = file_tensors(rows, shapes)
    rest = said.rest(cfg)
    planned = _Planned({t.key: t.shape for t in tensors} | {key: shape for key, (shape, _) in rest.items()})
    part = Part(config, processor, "", planned, video)
    back = make_config(cls, family.options(part))
    back = replace(back, **{n: getattr(cfg, n) for n in TAKEN if hasattr(cfg, n)})
    for name, ours in vars(cfg).items():
        there = getattr(back, name)
        if heeded(ours) != heeded(there):
            raise ValueError(
                f"a {config['model_type']} folder cannot say {name}={ours!r}; it would be {there!r}"
            )
    files = {PREPROCESSOR: processor, **({VIDEO_PREPROCESSOR: video} if video else {})}
    return Written(family, config, files, tensors, shapes=shapes, rest=rest, stem=said.stem)


# The sizes of pictures that each way to fit them heeds.
HEEDED = {
    "exact": ("height", "width"),
    "crop": ("height", "width", "edge"),
    "smart": ("least", "most"),
    "patches": ("most",),
    "tiles": ("height", "width", "least", "most"),
    "longest": ("edge",),
    "none": (),
}


def heeded(value: Any) -> Any:
    """An option without what nothing reads, and names without their order."""
    if isinstance(value, tuple) and all(isinstance(x, str) for x in value):
        return frozenset(value)
    if not isinstance(value, Pictures) or value.fit not in HEEDED:
        return value
    sizes = ("height", "width", "edge", "least", "most")
    unheeded: dict[str, Any] = {n: 0 for n in sizes if n not in HEEDED[value.fit]}
    return replace(value, **unheeded)


def _family_of(cls: type[Encoder]) -> tuple[Family, Said]:
    name = family_name(cls)
    if name in SAID:
        return next(f for f in FAMILIES if f.encoder == name), SAID[name]
    known = ", ".join(f.encoder for f in FAMILIES if f.encoder in SAID)
    raise ValueError(f"{cls.__name__} is of no published family that can be written; these can: {known}")


class _Planned(SafeFolder):
    """The shapes of a folder that is not there yet."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes

    def config(self) -> dict[str, Any]:
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(shape) for key, shape in self._shapes.items()}
