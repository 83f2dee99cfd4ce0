"""What is held of every family of encoders, for the table of docs/encoders.md."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import encoders
from encoders.foreign import ForeignOptions
from encoders.hf import fill, load_hf
from encoders.hf.folder import open_folder
from encoders.module import EncoderModule, build_encoder_module, check_encoder, encoder_stages
from encoders.projector import ProjectorKind
from encoders.vision.config import Pictures
from llm import load_hf as load_llm
from llm.decode import Prompt, generate
from mm.containers.card import encoder_contents
from mm.containers.container import Tower
from mm.containers.write import with_constants
from parallel.published import FILE_BYTES, module_tensors, write_folder
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes
from tests.encoders import foreign, published, speech, test_adapter, test_audio
from tests.encoders.helpers import Item, cut, make_axes, png
from tests.encoders.published_checks import hold_exact as hold_exact_vision
from tests.encoders.test_context import error
from tests.llm import families
from tests.llm.widened import Widened
from tests.pool import Pool

# By family, the models of transformers that are read as it. The last is any class that is not built in.
MODELS: dict[str, tuple[str, ...]] = {
    "siglip": ("siglip",),
    "siglip2": ("siglip2",),
    "clip": ("clip",),
    "image_vit": ("image_vit",),
    "dinov2": ("dinov2", "dinov2_giant", "dinov2_registers"),
    "dinov3": ("dinov3", "dinov3_gated"),
    "radio": ("radio",),
    "internvl": ("internvl", "internvl_rms"),
    "pixtral": ("pixtral",),
    "qwen2_5_vl": ("qwen2_5_vl",),
    "qwen3_vl": ("qwen3_vl",),
    "whisper": ("whisper", "whisper_whole"),
    "wav2vec2": ("wav2vec2",),
    "hubert": ("hubert",),
    "parakeet": ("parakeet", "parakeet_ctc"),
    "audioflamingo3": ("audioflamingo3",),
    "hf:FOLDER": tuple(test_adapter.CLASSES),
}
FOREIGN = "hf:FOLDER"
LLAVA = ProjectorKind("mlp", "gelu", bias=True, norm="none")
# (cp, tp, sequence parallelism) of two ranks; pp is two stages, one after the other.
LAYOUTS = {"tp": (1, 2, True), "cp": (2, 1, False), "pp": (1, 1, False)}


def hold_exact(name: str, seed: int, folder: Path) -> None:
    """Last hidden state and gradients are those of transformers, in float64 and, built in, in float32."""
    if name in published.MODELS:
        options = published.random_options(name, seed)
        hold_exact_vision(name, folder / "64", torch.float64, 1e-10, seed, **options)
        hold_exact_vision(name, folder / "32", torch.float32, 1e-5, seed, **options)
    elif name in speech.FAMILIES:
        test_audio.compare(name, seed, folder / "64", torch.float64, 1e-10)
    else:
        test_adapter.hold_exact(name, folder, seed)


def hold_round_trip(name: str, seed: int, folder: Path) -> str:
    """What was read and written again has the same parameters, and transformers loads it, with no tensor
    missing or left over, to the same last hidden state, bit by bit: "yes".

    "card": its family is not written alone, but as it is here, for a folder with a card.
    """
    path = saved(name, seed, folder / "in", dtype=torch.float32)
    if name in test_adapter.CLASSES:
        cfg = ForeignOptions(folder=str(path))
        tower, held = Tower("hf:", encoders.resolve("hf:"), cfg, LLAVA, 24), {}
    else:
        opened, held = open_folder(path), module_tensors(load_hf(path).encoder)
        tower = Tower(opened.family.encoder, opened.cls, opened.cfg, LLAVA, 24)
    contents, constants, said = encoder_contents("m", tower)
    if said is None:
        assert contents.config["model_type"] == "polyrank" and contents.config["encoder"] == tower.encoder
        return "card"
    values = {f"m.encoder.{n}": t for n, t in held.items()}
    fetch = with_constants(lambda names: {n: values[n] for n in names}, constants)
    write_folder(contents, fetch, folder / "out", None, FILE_BYTES)
    for file, settings in said.processors.items():
        (folder / "out" / file).write_text(json.dumps(settings))
    hold_same_bytes(path, folder / "out", said.stem)
    if name in published.MODELS:
        model = published.oracle(name, torch.float32, seed, **published.random_options(name, seed))
        given = published.inputs(name, model, seed, torch.float32)[0]
        run = [published.run(name, m, given) for m in (model, loaded(type(model), folder / "out"))]
    else:
        made = speech.model(name, seed)
        inner, given = speech.encoder_of(made), test_audio.inputs_of(made, seed)
        run = [m(**given).last_hidden_state for m in (inner, loaded(type(inner), folder / "out"))]
    # One activation of Whisper has two names, whose float32 differs in the last bits.
    most = 1e-5 if name in ("whisper", "whisper_whole", "audioflamingo3") else 0.0
    assert float((run[0] - run[1]).detach().abs().max()) <= most
    return "yes"


def hold_same_bytes(there: Path, back: Path, stem: str) -> None:
    """Each tensor that is read in `there` has the same bytes in `back`, whose keys begin with `stem`, and its
    options are the same."""
    given, again = open_folder(there), open_folder(back)
    assert again.cfg == given.cfg
    old, new = load_file(there / "model.safetensors"), load_file(back / "model.safetensors")
    assert len(given.tensors) == len(again.tensors)
    for ours, theirs in zip(given.tensors, again.tensors, strict=True):
        assert ours.parts == theirs.parts and theirs.key.startswith(stem), (ours.key, theirs.key)
        a, b = old[ours.key], new[theirs.key]
        assert a.dtype == b.dtype and a.shape == b.shape, ours.key
        assert a.numpy().tobytes() == b.numpy().tobytes(), ours.key


def loaded(cls: Any, folder: Path) -> Any:
    """transformers' model of a folder, all of whose tensors it has."""
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    # A pooler is a head, which is not written.
    missing = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
    assert not missing and not found["unexpected_keys"], found
    assert not found["mismatched_keys"], found
    return model.eval()


def saved(
    name: str, seed: int, folder: Path, *, even: bool = False, dtype: torch.dtype = torch.float64
) -> Path:
    """The folder of a random model; even: of heads and layers that two ranks share."""
    if name in published.MODELS:
        options = published.random_options(name, seed, 2 if even else 5)
        return published.saved(published.oracle(name, dtype, seed, **options), folder)
    if name in speech.FAMILIES:
        return speech.folder(speech.model(name, seed, even=even), folder)
    return foreign.folder(name, folder, seed)


def items(name: str, net: Any, seed: int) -> list[Item]:
    """Some of several sizes, as the encoder takes them."""
    r = random.Random(seed)
    if name not in published.MODELS:
        return test_adapter.items(not name.startswith(("W", "w", "hubert", "parakeet", "audio")))
    side = net.side
    sizes = [(side * r.randint(1, 4), side * r.randint(1, 4)) for _ in range(4)]
    return [(png(h, w, i, "RGB"), {"height": h, "width": w, "channels": 3}) for i, (h, w) in enumerate(sizes)]


def module_of(name: str, folder: Path, axes: Axes, stages: int = 1) -> list[EncoderModule]:
    """The stages of the folder's encoder with a projector, of which this rank holds its part."""
    if name in published.MODELS or name in speech.FAMILIES:
        opened = open_folder(folder)
        cls, cfg = opened.cls, opened.cfg
        if name in published.MODELS:
            cfg = replace(cfg, pictures=Pictures("none"))
    else:
        opened, cls, cfg = None, encoders.resolve("hf:"), ForeignOptions(folder=str(folder))
    check_encoder(cls, cfg, tp=axes.tp.size, cp=axes.cp.size, pp=stages)
    out = []
    for stage in encoder_stages(cls, cfg, stages) if stages > 1 else (None,):
        made = build_encoder_module(
            cls,
            cfg,
            d_out=20,
            projector_hidden=24,
            axes=axes,
            projector=LLAVA,
            stage=stage,
            dtype=torch.float64,
        )
        initialise(made, 0, name)
        if opened is not None:
            fill(made, opened)
        cut(made)
        out.append(made)
    return out


def split_error(name: str, column: str, folder: str, seed: int, wide: bool = False) -> float:
    """Largest error of this rank's features and gradients, of those of one process.

    wide: with float64 where code asks for float32."""
    axes = make_axes(*LAYOUTS[column])
    nets = module_of(name, Path(folder), axes, 2 if column == "pp" else 1)
    (alone,) = module_of(name, Path(folder), Axes())
    with Widened() if wide else nullcontext():
        return error(nets, alone, items(name, nets[0].cfg, seed))


def hold_layout(name: str, column: str, seed: int, folder: Path, pool: Pool) -> str:
    """Two ranks, or two stages, have the features and gradients of one process: "yes".

    Classes that are not built in run "whole" on every rank of tp; cp and pp of them are "refused" by name.
    """
    path = saved(name, seed, folder, even=True)
    if name in test_adapter.CLASSES and column != "tp":
        cfg = ForeignOptions(folder=str(path))
        with pytest.raises(ValueError, match=f"is given {column}=2, but does not declare"):
            check_encoder(encoders.resolve("hf:"), cfg, **{column: 2})
        return "refused"
    ranks = 1 if column == "pp" else 2
    # Pixtral's own class rounds its norms to float32, for each tp rank's rows apart: it is off by that alone.
    rounds = name == "PixtralVisionModel"
    assert max(pool.run(ranks, split_error, name, column, str(path), seed)) < (1e-6 if rounds else 1e-9)
    if rounds:
        assert max(pool.run(ranks, split_error, name, column, str(path), seed, True)) < 1e-9
    return "whole" if name in test_adapter.CLASSES else "yes"


def hold_generate(name: str, seed: int, folder: Path) -> None:
    """An item's rows, through a projector, stand in a prompt of a Llama: the greedy answer is that of
    transformers' generate from what its own classes make of the item."""
    ours, theirs = both_rows(name, seed, folder / "encoder")
    width, gen = ours.shape[-1], torch.Generator().manual_seed(seed)
    up, down = (torch.randn(s, generator=gen, dtype=torch.float64) / 5 for s in ((24, width), (32, 24)))

    def project(rows: Tensor) -> Tensor:
        return torch.nn.functional.gelu(rows.double() @ up.T) @ down.T

    config = families.config_of("llama", families.even("llama", seed))
    language = families.build(config, seed=seed).eval()
    llm = load_llm(families.save(language, folder / "llm"), dtype=torch.float64).model.eval()
    before, after = torch.tensor([3, 7]), torch.tensor([9, 4, 1])
    middle = torch.zeros(len(ours), dtype=torch.int64)
    at = torch.arange(2, 2 + len(ours))
    prompt = Prompt(torch.cat([before, middle, after]), {"item": project(ours)}, {"item": at})
    parts = [language.get_input_embeddings()(ids) for ids in (before, after)]
    embedded = torch.cat([parts[0], project(theirs), parts[1]])[None]
    with Widened(), torch.no_grad():
        expected = language.generate(
            inputs_embeds=embedded, do_sample=False, max_new_tokens=12, eos_token_id=None, use_cache=False
        )
    assert generate(llm, [prompt], 12)[0] == expected[0].tolist()


@torch.no_grad()
def both_rows(name: str, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """The feature rows of one item or two, ours and those of transformers."""
    if name in published.MODELS:
        model = published.oracle(name, seed=seed, **published.random_options(name, seed))
        net = load_hf(published.saved(model, folder))
        given = published.inputs(name, model, seed)[0]
        found = (net.features(given), published.run(name, model, given))
        ours, theirs = (published.real(name, given, rows) for rows in found)
        return ours.flatten(0, -2), theirs.flatten(0, -2)
    if name in speech.FAMILIES:
        made = speech.model(name, seed)
        net = load_hf(speech.folder(made, folder), torch.float64)
        given = test_audio.inputs_of(made, seed)
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        return test_audio.real_rows(net.features(given), speech.encoder_of(made.double())(**given), given)
    path = foreign.folder(name, folder, seed)
    cfg = ForeignOptions(folder=str(path))
    net, (item, *_) = test_adapter.made(cfg), test_adapter.items(test_adapter.CLASSES[name][0] < 50)
    return net(test_adapter.batch(cfg, [item])).values, test_adapter.alone(net, path, *item)
