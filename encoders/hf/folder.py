"""A folder of published weights, opened for the encoder in it: which family it is of, and its options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from encoders.contract import Encoder
from encoders.hf.audio import FAMILIES as AUDIO
from encoders.hf.family import Family, Part
from encoders.hf.qwen import FAMILIES as QWEN
from encoders.hf.towers import FAMILIES as TOWERS
from encoders.hf.vision import FAMILIES as VISION
from encoders.registry import resolve
from parallel.published import FileTensor, SafeFolder, check_tensors, file_tensors, module_shapes
from parallel.published.read import stored_dtypes
from parallel.topology.axis import Axes

FAMILIES: tuple[Family, ...] = (*VISION, *TOWERS, *QWEN, *AUDIO)

PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"

# Sections of the config of a whole model that an encoder's config may be.
SECTIONS = ("vision_config", "audio_config", "sound_config", "encoder_config", "thinker_config")

# Keys of other parts of whole models, which are left alone.
BESIDE = tuple(
    re.compile(pattern)
    for pattern in (
        r"(.*\.)?(text_model|language_model|vision_tower|vision_model|audio_tower|sound_encoder|decoder)\..*",
        r"(model\.)?(layers|norm|embed_tokens|lm_head|proj_out|image_newline)(\..*)?",
        r"(.*\.)?(multi_modal_projector|mlp1|sound_projection|input_conditioner)\..*",
        r"(visual|text)_projection\.weight|logit_(scale|bias)|.*summary_idxs",
        r"(classifier|decoder|head|lm_head|ctc_head|pooler)\..*",
        r"(joint|encoder_projector|quantizer|project_q|project_hid|projector|layer_weights)(\..*)?",
    )
)


def family_name(cls: type[Encoder]) -> str:
    """The name of the published family that an encoder is of; "" where it is of none."""
    return next((f.encoder for f in FAMILIES if resolve(f.encoder) is cls), "")


def kind_of(cls: type[Encoder]) -> str:
    """What an encoder of a published family takes: vision or audio; "" where it is of none."""
    name = family_name(cls)
    return "" if not name else "audio" if name in (f.encoder for f in AUDIO) else "vision"


@dataclass(frozen=True)
class Opened:
    """A folder with one of its encoders.

    cls, cfg: the encoder as the folder has it, with all layers.
    tensors: its parameters' tensors.
    unused: keys in the folder that it does not read: of other parts of a whole model, or of a head.
    """

    part: Part
    family: Family
    cls: type[Encoder]
    cfg: Any
    tensors: list[FileTensor]
    unused: tuple[str, ...]

    def options(self, given: Any, named: Mapping[str, Any]) -> Any:
        """The folder's options, with those that `named` names as `given` has them.

        Only options that change no tensor may differ; of layers fewer may be wanted, and no final norm.
        Raises ValueError for others, saying what the folder has.
        """
        changed: dict[str, Any] = {}
        for name, value in named.items():
            mine, theirs = getattr(given, name), getattr(self.cfg, name)
            if isinstance(value, Mapping):
                mine = replace(theirs, **{key: getattr(mine, key) for key in value})
            less = name not in ("layers", "final_norm") or mine < theirs
            if mine != theirs and not (less and name in self.family.free):
                raise ValueError(
                    f"{self.part.folder.path} has {name}={theirs!r}, the options {name}={mine!r}; needed: "
                    f"the same, or none given (options that may differ: {', '.join(self.family.free)})"
                )
            changed[name] = mine
        return replace(self.cfg, **changed)


def open_folder(path: str | Path, encoder: str | None = None) -> Opened:
    """The encoder in a folder, of any known family or of that registered as `encoder`.

    Whole models are taken too: their other parts are left alone and listed as unused. Reads no tensor data.
    Raises ValueError for an unknown family, options that ours cannot have, and tensors that are missing,
    unknown or of another shape, by name.
    """
    folder = SafeFolder(path)
    family, config = _find(folder, encoder)
    said = _processor(folder.path, PREPROCESSOR, ("image_processor", "feature_extractor"))
    video = _processor(folder.path, VIDEO_PREPROCESSOR, ("video_processor",))
    part = Part(config, said, _prefix(folder, family.probe), folder, video)
    cls = resolve(family.encoder)
    cfg = make_config(cls, family.options(part))
    cls.check(cfg, 1)
    shapes = module_shapes(cls(cfg, Axes(), device="meta", dtype=None))
    keys = {_spelled(k, family): part.prefix + k for k in part.shapes()}
    tensors = [
        replace(t, key=keys.get(t.key, part.prefix + t.key)) for t in file_tensors(family.rows(cfg), shapes)
    ]
    wanted, given = {t.key for t in tensors}, folder.shapes()
    unused = tuple(sorted(k for k in given if k not in wanted and _is_unused(k, part.prefix, family)))
    check_tensors(tensors, {k: s for k, s in given.items() if k not in unused}, str(folder.path))
    stored_dtypes(tensors, folder)  # refuses quantised weights, whose bits are no numbers
    return Opened(part, family, cls, cfg, tensors, unused)


def make_config(cls: type[Encoder], options: Mapping[str, Any]) -> Any:
    """A Config of these options; mappings and lists in them become records and tuples."""
    defaults = cls.Config()
    given = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            value = replace(getattr(defaults, name), **value)
        given[name] = tuple(value) if isinstance(value, list) else value
    return replace(defaults, **given)


def _find(folder: SafeFolder, encoder: str | None) -> tuple[Family, Mapping[str, Any]]:
    """The family of a folder's encoder, and its section of config.json."""
    whole = folder.config()
    families = [f for f in FAMILIES if encoder in (None, f.encoder)]
    sections = [whole[s] for s in SECTIONS if isinstance(whole.get(s), Mapping)]
    sections += [x[s] for x in sections for s in SECTIONS if isinstance(x.get(s), Mapping)]
    for config in (*sections, whole):
        for family in families:
            if config.get("model_type") in family.model_types:
                # Sections of older files do not say their type, but the whole model does.
                return family, sections[0] if config is whole and sections else config
    said = [str(c.get("model_type")) for c in (whole, *sections)]
    known = ", ".join(t for f in families for t in f.model_types)
    raise ValueError(
        f"{folder.path} is of model_type {', in it '.join(said)}, and no encoder that is known here"
        f"{f' as {encoder}' if encoder else ''}; known: {known}"
    )


def _prefix(folder: SafeFolder, probe: str) -> str:
    """What the keys of the encoder's tensors begin with, told by the one that ends with `probe`."""
    found = sorted(k for k in folder.shapes() if k == probe or k.endswith("." + probe))
    if not found:
        raise ValueError(f"{folder.path} has no tensor {probe}, as its family has; needed: the whole folder")
    return min(found, key=len).removesuffix(probe)


def _spelled(key: str, family: Family) -> str:
    """A key without its prefix as the family's table writes it."""
    for pattern, ours in family.spellings:
        key = re.sub(pattern, ours, key)
    return key


def _is_unused(key: str, prefix: str, family: Family) -> bool:
    if key.startswith(prefix) and any(re.fullmatch(p, key.removeprefix(prefix)) for p in family.unused):
        return True
    if prefix and key.startswith(prefix):
        return False
    return any(p.fullmatch(key) for p in BESIDE)


def _processor(path: Path, own: str, sections: Sequence[str]) -> Mapping[str, Any]:
    """The settings of a processor, from its own file or from a section of the file of all processors."""
    for name in (own, "processor_config.json"):
        file = path / name
        if file.is_file():
            try:
                found: Mapping[str, Any] = json.loads(file.read_text())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is unreadable: {error}") from error
            inner: list[Mapping[str, Any]]
            inner = [found[s] for s in sections if isinstance(found.get(s), Mapping)]
            if inner or own == PREPROCESSOR or name == own:
                return inner[0] if inner else found
    return {}
