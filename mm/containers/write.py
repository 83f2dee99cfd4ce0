"""A whole model as the files of a container, without the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from encoders.hf.saying import Rest
from encoders.hf.write import Written, written
from encoders.projector import Projector
from llm.hf.config import config_of, export_family
from llm.hf.weights import model_tensors
from mm.containers.container import Container, Pairs, Tower, Whole
from parallel.published import Contents, Fetch, FileTensor, Shape, module_shapes
from parallel.published.tables import Part
from parallel.topology.axis import Axes

SINK = "llm"
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
IN_PROCESSOR = {"vision": "image_processor", "audio": "feature_extractor"}


@dataclass(frozen=True)
class Files:
    """A container's files, and what reading them needs beside a checkpoint.

    contents: names are those of a checkpoint, module first. constants: by name, what no parameter holds.
    zero: names that the files lack, which must be zero. json: further files by name.
    """

    contents: Contents
    constants: Mapping[str, Tensor]
    zero: Sequence[str]
    json: Mapping[str, Mapping[str, Any]]


def files_of(container: Container, whole: Whole, tokens: Mapping[str, tuple[int, str]]) -> Files:
    """The files of a model in a container that can hold it.

    tokens: by module, id and text of the token in the place of its rows.
    """
    family = export_family(whole.llm)
    language, held, zero = model_tensors(whole.llm, family)
    tensors = [moved(t, container.language(t.key), f"{SINK}.") for t in language]
    shapes: dict[str, Shape] = {f"{SINK}.{n}": s for n, s in held.items()}
    towers = {m: written(t.cls, t.cfg) for m, t in whole.towers.items()}
    constants: dict[str, Tensor] = {}
    for module, kind in whole.kinds.items():
        place, tower, projector = container.places[kind], towers[module], f"{module}.projector."
        before = place.tower
        tensors += [moved(t, before + tower.stem + t.key, f"{module}.encoder.") for t in tower.tensors]
        shapes |= {f"{module}.encoder.{n}": s for n, s in tower.shapes.items()}
        found = constants_of(container.rest(whole.towers[module], tower.rest), before)
        tensors += [FileTensor(n[1:], tuple(t.shape), (Part(n),)) for n, t in found.items()]
        shapes |= {n: tuple(t.shape) for n, t in found.items()}
        constants |= found
        joined = projector_shapes(whole.towers[module], whole.llm.d_model)
        tensors += [moved(t, t.key, projector) for t in projector_tensors(place.projector, joined)]
        shapes |= {projector + n: s for n, s in joined.items()}
    config = {
        "architectures": [container.architecture],
        "model_type": container.name,
        **container.config(whole, config_of(family, whole.llm, "float32"), towers),
        **{container.tokens[kind].field: tokens[m][0] for m, kind in whole.kinds.items()},
    }
    json = _processors(container, whole, towers, {m: text for m, (_, text) in tokens.items()})
    contents = Contents(tensors, shapes, config, precise=_precise)
    return Files(contents, constants, [f"{SINK}.{n}" for n in zero], json)


def _processors(
    container: Container, whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    """Settings of the processor by file: newer programs read them in one file, older ones in two."""
    said = container.processor(whole, towers, texts)
    inner = {IN_PROCESSOR[kind]: towers[m].processor for m, kind in whole.kinds.items()}
    inner |= {name: said[name] for name in inner if name in said}
    first = next((inner[name] for name in IN_PROCESSOR.values() if name in inner), {})
    head = {key: said[key] for key in ("processor_class",) if key in said}
    return {PROCESSOR: {**said, **inner}, PREPROCESSOR: {**first, **head}}


def _precise(key: str) -> bool:
    """Whether a tensor is float32 at least: the routing bias."""
    return key.endswith("e_score_correction_bias")


def moved(tensor: FileTensor, key: str, before: str) -> FileTensor:
    """A tensor of a module under its key in the container, its parameters under their names in a job."""
    parts = tuple(replace(p, name=before + p.name) for p in tensor.parts)
    return replace(tensor, key=key, parts=parts)


def with_constants(inner: Fetch, constants: Mapping[str, Tensor]) -> Fetch:
    """inner, with constants in the dtype of what was fetched before them."""
    last: list[torch.dtype] = []

    def get(names: Sequence[str]) -> Mapping[str, Tensor]:
        if names[0] in constants:
            return {n: _as(constants[n], last[-1]) for n in names}
        found = inner(names)
        last[:] = [t.dtype for t in found.values()]
        return found

    return get


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A constant in the dtype of weights: zeros and ones alone, as others would be rounded."""
    return value.to(dtype) if value.is_floating_point() and value.eq(value.round()).all() else value


def projector_shapes(tower: Tower, d_model: int) -> dict[str, Shape]:
    """Shape of each parameter of a module's projector."""
    widths = (tower.cls.feature_width(tower.cfg), tower.hidden, d_model)
    return module_shapes(Projector(widths, Axes(), tower.projector, device="meta", dtype=None))


def projector_tensors(pairs: Pairs, shapes: Mapping[str, Shape]) -> list[FileTensor]:
    """The tensors of a projector, of those parameters that it has. shapes: of its parameters."""
    out = [FileTensor(key, shapes[name], (Part(name),)) for key, name in pairs if name in shapes]
    assert len(out) == len(shapes), shapes
    return out


def constants_of(rest: Rest, before: str) -> dict[str, Tensor]:
    """Tensors that a class has beside those of ours, by "=" and their key; before: what it begins with."""
    return {
        f"={before}{key}": torch.stack([torch.full((), v) for v in value]).view(shape)
        if isinstance(value, tuple)
        else torch.full(shape, value)
        for key, (shape, value) in rest.items()
    }
