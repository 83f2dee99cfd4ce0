"""Encoder classes of the transformers package, read from a folder in its format.

That package is imported here alone, in functions, and only where a config asks for hf:FOLDER. It decides what
its classes compute; here they are found, checked, filled, and run once for each size of item on the meta
device, to learn how many rows the item gives and what that costs.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from encoders import compat

Inputs = dict[str, Tensor]  # what a processor gives for one item, by the name of the forward's argument
Size = tuple[int, ...]  # (height, width) of a picture, or (samples,) of a clip at the encoder's rate
FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ForeignOptions:
    """What is taken of a folder, and how.

    folder: with config.json, safetensors files and preprocessor_config.json or processor_config.json.
    part: dotted name of the submodule that is the encoder; "" finds it.
    modality: image or audio where the folder's processor takes both; "" finds it.
    output: which of the class's outputs are the features.
    drop: leading rows of each picture or tile that are left out, such as 1 for a class token.
    ignore: patterns of names of tensors that may be missing from the files, or unknown to the class.
    seconds: longer clips end there.
    """

    folder: str = ""
    part: str = ""
    modality: str = ""
    output: str = "last_hidden_state"
    drop: int = 0
    ignore: tuple[str, ...] = ()
    seconds: float = 30.0


@dataclass(frozen=True)
class Probe:
    """What is known of items of one size before any is read.

    main: name of the input that depends on the item's content; shape: of it.
    others: inputs that depend on the size alone, such as masks and grids.
    rows, width: of the features. flops: of the forward. batched: whether dim 0 of the input is a batch, so
        that several items may run at once.
    """

    main: str
    shape: tuple[int, ...]
    others: Mapping[str, Tensor]
    rows: int
    width: int
    flops: float
    batched: bool

    def like(self, other: Probe) -> bool:
        """Whether items of the two sizes may run as one batch."""
        return self.batched and self.key == other.key

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for items whose inputs differ in content alone."""
        return self.shape, _by_value(self.others)


def package() -> Any:
    """The transformers package. Raises ValueError where it is not installed."""
    compat.repair()
    try:
        found = importlib.import_module("transformers")
        found.utils.logging.disable_progress_bar()  # every rank would draw its own
        return found
    except ImportError as error:
        raise ValueError(
            f"hf:FOLDER runs classes of the transformers package, which cannot be imported ({error}); "
            "needed: pip install transformers, or an encoder that is built in"
        ) from error


@cache
def processor(opts: ForeignOptions) -> tuple[str, Any]:
    """The modality, image or audio, and the folder's processor of it. Raises ValueError where it has none."""
    found = _modalities(Path(opts.folder))
    wanted = opts.modality or (found[0] if len(found) == 1 else "")
    if wanted not in found:
        raise ValueError(
            f"{opts.folder} has processors of {' and '.join(found) or 'nothing'} in {' or '.join(FILES)}; "
            f"needed: the option modality={' or '.join(found) or 'image or audio, and such a file'}"
        )
    name = "AutoImageProcessor" if wanted == "image" else "AutoFeatureExtractor"
    auto = getattr(package(), name)
    try:
        return wanted, auto.from_pretrained(opts.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{opts.folder}: its processor cannot be made: {_line(error)}") from error


def _modalities(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; needed: a folder as save_pretrained() writes it")
    found = set()
    for file in FILES:
        if (folder / file).is_file():
            raw = json.loads((folder / file).read_text())
            for part in (raw, *(v for v in raw.values() if isinstance(v, dict))):
                if "sampling_rate" in part:
                    found.add("audio")
                elif "image_mean" in part or "image_processor_type" in part:
                    found.add("image")
    return sorted(found, reverse=True)


def process(opts: ForeignOptions, content: Any) -> Inputs:
    """A PIL picture or float32 samples [n] at rate() to the tensors that the encoder takes."""
    modality, made = processor(opts)
    if modality == "image":
        given = made(images=content, return_tensors="pt")
    else:
        given = made(content.numpy(), sampling_rate=made.sampling_rate, return_tensors="pt")
    known = inspect.signature(skeleton(opts).forward).parameters
    return {k: v for k, v in given.items() if k in known and isinstance(v, Tensor)}


def rate(opts: ForeignOptions) -> int:
    """Samples a second that the folder's feature extractor takes."""
    return int(processor(opts)[1].sampling_rate)


@cache
def probe(opts: ForeignOptions, size: Size) -> Probe:
    """What an item of a size becomes: one call of the processor for each size, and one of the encoder on the
    meta device for each shape. Raises ValueError for a size that either refuses."""
    modality, _ = processor(opts)
    try:
        inputs = process(opts, _blank(modality, size))
    except Exception as error:  # a processor may raise anything for a size that it cannot take
        raise ValueError(f"{_named(opts)}: no {modality} of size {size}: {_line(error)}") from error
    main = getattr(skeleton(opts), "main_input_name", "")
    if main not in inputs:
        raise ValueError(
            f"{_named(opts)} takes {main or 'inputs of other names'}, but of those the folder's processor "
            f"gives {', '.join(inputs) or 'none'}; needed: the part whose input that is (option part)"
        )
    shape = tuple(inputs[main].shape)
    others = {k: v for k, v in inputs.items() if k != main}
    rows, width, flops, batched = _run_once(opts, main, shape, _Others(_by_value(others), others))
    if not rows:
        raise ValueError(f"{_named(opts)} gives no row of size {size} where {opts.drop} are dropped")
    return Probe(main=main, shape=shape, others=others, rows=rows, width=width, flops=flops, batched=batched)


@dataclass(frozen=True)
class _Others:
    """Inputs that a cache compares by value."""

    key: tuple[Any, ...]
    inputs: Mapping[str, Tensor] = field(compare=False)


def _by_value(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((k, tuple(v.shape), v.numpy().tobytes()) for k, v in inputs.items())


@cache
def _run_once(
    opts: ForeignOptions, main: str, shape: tuple[int, ...], others: _Others
) -> tuple[int, int, float, bool]:
    """Rows, width and FLOPs of an item of these inputs, and whether their dim 0 is a batch."""
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            _, features = _dry(opts, main, shape, others.inputs)
        twice = {k: torch.cat([v, v]) for k, v in others.inputs.items()}
        with torch.no_grad():
            _, two = _dry(opts, main, (2 * shape[0], *shape[1:]), twice)
    except Exception as error:  # a class may raise anything for a shape that it cannot take
        raise ValueError(
            f"{_named(opts)} cannot take {main} of shape {list(shape)}: {_line(error)}"
        ) from error
    rows = table(features, opts.drop)
    return len(rows), int(rows.shape[1]), float(counter.get_total_flops()), _batched(features, two, shape)


def _dry(
    opts: ForeignOptions, main: str, shape: tuple[int, ...], others: Mapping[str, Tensor]
) -> tuple[Any, Tensor]:
    """The encoder without its weights, and its features of zeros: on the meta device, or on the CPU for a
    class that looks at values."""
    try:
        inner = skeleton(opts)
        given = {k: torch.empty_like(v, device="meta") for k, v in others.items()}
        output = inner(**{main: torch.zeros(shape, device="meta")}, **given)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        inner = _standin(opts)
        output = inner(**{main: torch.zeros(shape)}, **others)
    return inner, pick(output, opts)


def _batched(one: Tensor, two: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether dim 0 of inputs of this shape is a batch, given the features of one and of two items."""
    return one.ndim > 2 and one.shape[0] == shape[0] and two.shape == (2 * shape[0], *one.shape[1:])


def pick(output: Any, opts: ForeignOptions) -> Tensor:
    """The features among the outputs of a class."""
    found = getattr(output, opts.output, None)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4):
        known = ", ".join(k for k, v in dict(output).items() if isinstance(v, Tensor))
        raise ValueError(f"it has no output {opts.output} of rows; needed: option output, one of {known}")
    return found


def table(features: Tensor, drop: int) -> Tensor:
    """Features [n, width], [batch, n, width] or maps [batch, width, h, w] as rows, without the first `drop`
    of each n."""
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return features[..., drop:, :].flatten(0, -2)


@cache
def skeleton(opts: ForeignOptions) -> Any:
    """The encoder on the meta device, in eval mode."""
    made = _whole_class(opts.folder)
    with torch.device("meta"):
        whole = made(_config(opts.folder))
    return _part(whole, opts).eval()


@cache
def _standin(opts: ForeignOptions) -> Any:
    """The encoder on the CPU with weights of no meaning, in eval mode."""
    return _part(_whole_class(opts.folder)(_config(opts.folder)), opts).eval()


def read(opts: ForeignOptions, dtype: torch.dtype | None) -> nn.Module:
    """The encoder with the folder's weights, on the CPU and in eval mode.

    dtype: float64 reads float64, all others float32. Raises ValueError naming the tensors that are missing,
    unknown or of another shape.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = _whole_class(opts.folder)
    try:
        model, said = made.from_pretrained(
            opts.folder, dtype=wide, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{opts.folder}: its weights cannot be read: {_line(error)}") from error
    wrong = []
    for kind, what in (("missing_keys", "missing"), ("unexpected_keys", "unknown")):
        names = sorted(k for k in said[kind] if not any(fnmatch.fnmatch(k, p) for p in opts.ignore))
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            wrong.append(f"{what}: {', '.join(names[:8])}{more}")
    wrong += [f"of another shape: {m}" for m in sorted(map(str, said["mismatched_keys"]))[:8]]
    if wrong:
        raise ValueError(
            f"{opts.folder} is no checkpoint of the {made.__name__} that its config.json describes. "
            f"{'; '.join(wrong)}; needed: whole weights, or the option ignore with patterns of these names"
        )
    found: nn.Module = _part(model, opts).eval()
    return found


def untrained(opts: ForeignOptions, known: Probe) -> set[str]:
    """Names of parameters that the class does not train, or that the features do not depend on, such as those
    of a pooling head."""
    with torch.enable_grad():
        inner, features = _dry(opts, known.main, known.shape, known.others)
        named = {k: p for k, p in inner.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
    fixed = {name for name, p in inner.named_parameters() if not p.requires_grad}
    return fixed | {name for name, grad in zip(named, grads, strict=True) if grad is None}


@cache
def _config(folder: str) -> Any:
    auto = package().AutoConfig
    try:
        return auto.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: the installed transformers does not know its config: {_line(error)}"
        ) from error


@cache
def _whole_class(folder: str) -> Any:
    """The class that the folder's files are of: the first of `architectures`, else what AutoModel takes."""
    config, transformers = _config(folder), package()
    name = (config.architectures or [""])[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    try:
        with torch.device("meta"):
            auto = type(transformers.AutoModel.from_config(config))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: transformers has no class {name!r} for {config.model_type!r}: {_line(error)}"
        ) from error
    # Encoders of larger models, such as WhisperEncoder, are not names of the package itself.
    return getattr(importlib.import_module(auto.__module__), name, auto)


def _part(whole: Any, opts: ForeignOptions) -> Any:
    """The encoder in a model of the class of the folder's files."""
    if opts.part:
        try:
            return whole.get_submodule(opts.part)
        except AttributeError as error:
            names = ", ".join(name for name, _ in whole.named_children())
            raise ValueError(
                f"{type(whole).__name__} has no part {opts.part!r}; it has {names}, with parts of their own"
            ) from error
    if getattr(whole.config, "sub_configs", {}):
        return whole.get_encoder(modality=processor(opts)[0])
    if getattr(whole.config, "is_encoder_decoder", False) and hasattr(whole.base_model, "encoder"):
        return whole.base_model.encoder
    return whole.base_model


def _blank(modality: str, size: Size) -> Any:
    if modality == "audio":
        return torch.zeros(size)
    from PIL import Image

    return Image.new("RGB", (size[1], size[0]))


def _named(opts: ForeignOptions) -> str:
    return f"{type(skeleton(opts)).__name__} of {opts.folder}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
