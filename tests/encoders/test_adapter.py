"""Classes of the transformers package as encoders: hf:FOLDER gives what the class gives, item by item."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import encoders
from encoders import compat, foreign
from encoders.contract import ItemBatch
from encoders.foreign import ForeignOptions
from encoders.media.decode import read_sound
from parallel.topology.axis import Axes
from tests.encoders.foreign import folder
from tests.encoders.helpers import png, wav
from tests.slow import on_demand

CLASSES = {  # and the rows of items of PICTURES or CLIPS
    "SiglipVisionModel": (16, 16, 16),
    "ViTForImageClassification": (17, 17, 17),
    "ConvNextModel": (1, 1, 1),
    "CLIPModel": (17, 17, 17),
    "PixtralVisionModel": (16, 12, 16),  # which puts all pictures of a batch into one sequence
    "WhisperForConditionalGeneration": (50, 50, 50),
    "WhisperEncoder": (50, 50, 50),
    "Wav2Vec2Model": (225, 20, 225),
    "WavLMModel": (225, 20, 225),
}
SLOW = ("ConvNextModel", "WhisperForConditionalGeneration", "WavLMModel", "SiglipVisionModel")
PICTURES = [(40, 50), (40, 64), (40, 50)]
CLIPS = [(9000, 8000), (4410, 44100), (9000, 8000)]


def items(picture: bool) -> list[tuple[bytes, dict[str, int]]]:
    if picture:
        return [
            (png(h, w, i, "RGB"), {"height": h, "width": w, "channels": 3})
            for i, (h, w) in enumerate(PICTURES)
        ]
    return [(wav(n, rate, 2, seed=i), {"samples": n, "rate": rate}) for i, (n, rate) in enumerate(CLIPS)]


def made(cfg: ForeignOptions, dtype: torch.dtype = torch.float64) -> Any:
    cls = encoders.resolve("hf:")
    cls.check(cfg, 1)
    return cls(cfg, Axes(), device=None, dtype=dtype)


def batch(cfg: ForeignOptions, given: list[tuple[bytes, dict[str, int]]]) -> ItemBatch:
    cls, metas = encoders.resolve("hf:"), [meta for _, meta in given]
    tensors = [cls.prepare(cfg, payload, meta) for payload, meta in given]
    assert [len(t) for t in tensors] == [cls.input_count(cfg, meta) for meta in metas]
    return encoders.pack_items(cls, cfg, tensors, metas, device="cpu", dtype=torch.float64)


def alone(net: Any, path: Path, payload: bytes, meta: dict[str, int]) -> Tensor:
    """The features of one item by transformers' own model and processor."""
    inner = net.core.inner
    if "height" in meta:
        from transformers import AutoImageProcessor

        made = AutoImageProcessor.from_pretrained(path)
        given = made(images=Image.open(io.BytesIO(payload)).convert("RGB"), return_tensors="pt")
        given = {k: v for k, v in given.items() if k in ("pixel_values", "image_sizes")}
        if "Pixtral" not in type(inner).__name__:
            given.pop("image_sizes", None)
    else:
        from transformers import AutoFeatureExtractor

        made = AutoFeatureExtractor.from_pretrained(path)
        samples = compat.resample(*read_sound(payload), 16000)
        given = made(np.asarray(samples), sampling_rate=16000, return_tensors="pt")
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    found = inner(**given).last_hidden_state
    if found.ndim == 4:
        found = found.flatten(2).transpose(1, 2)
    return found.flatten(0, 1)


@pytest.mark.parametrize("name", on_demand(CLASSES, SLOW))
def test_a_folder_gives_what_its_own_class_gives(name: str, tmp_path: Path) -> None:
    hold_exact(name, tmp_path)


def hold_exact(name: str, tmp_path: Path, seed: int = 0) -> None:
    """Rows as promised, item by item whatever is beside it, gradients too, and no item at all."""
    path = folder(name, tmp_path / "made", seed)
    cfg = ForeignOptions(folder=str(path))
    net, given = made(cfg), items(CLASSES[name][0] < 50 and "W" not in name)
    found = net(batch(cfg, given))
    assert found.rows == CLASSES[name] == tuple(net.rows(cfg, meta) for _, meta in given)
    expected = torch.cat([alone(net, path, *item) for item in given])
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-10)
    weigh = torch.cos(torch.arange(found.values.numel(), dtype=torch.float64)).view_as(expected)
    trained = [p for p in net.parameters() if p.requires_grad]
    ours = torch.autograd.grad((found.values * weigh).sum(), trained)
    theirs = torch.autograd.grad((expected * weigh).sum(), trained)  # fails where one has no part in it
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    none = net(batch(cfg, []))
    assert none.rows == () and none.values.shape == (0, net.feature_width(cfg))
    assert all(g is not None and not g.any() for g in torch.autograd.grad(none.values.sum(), trained))
    assert not net.training or not any(m.training for m in net.core.inner.modules())


def test_items_with_other_masks_run_apart() -> None:
    """Two sizes may have main inputs of one shape, and other masks."""
    known: dict[str, Any] = {
        "main": "x",
        "shape": (1, 4),
        "rows": 2,
        "width": 3,
        "flops": 1.0,
        "batched": True,
    }
    a, b, c = (foreign.Probe(**known, others={"mask": torch.tensor([[1, n]])}) for n in (0, 1, 0))
    assert a.like(c) and not a.like(b)


def test_weights_and_buffers_are_those_of_the_folder(tmp_path: Path) -> None:
    path = folder("PixtralVisionModel", tmp_path / "made")
    net = made(ForeignOptions(folder=str(path)), torch.float32)
    stored, held = load_file(path / "model.safetensors"), net.core.inner.state_dict()
    assert len(stored) == len(held)
    for key, value in stored.items():
        name = key if key in held else key.removeprefix("vision_encoder.")
        assert torch.equal(held[name], value), key
    from transformers import PixtralVisionModel

    fresh = PixtralVisionModel.from_pretrained(path)
    buffers = dict(net.core.inner.named_buffers())
    assert buffers and all(torch.equal(buffers[k], v) for k, v in fresh.named_buffers())


@pytest.mark.parametrize("kind", ["missing", "unknown"])
def test_tensors_are_read_strictly(kind: str, tmp_path: Path) -> None:
    path = folder("ViTForImageClassification", tmp_path / "made")
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("mlp.fc1.weight") or k.endswith("intermediate.dense.weight"))
    if kind == "missing":
        del tensors[name]
    else:
        tensors["vit.encoder.extra.weight"] = torch.zeros(2)
        name = "vit.encoder.extra.weight"
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{kind}: .*needed: whole weights, or the option ignore"):
        made(ForeignOptions(folder=str(path)))
    if kind == "unknown":
        made(ForeignOptions(folder=str(path), ignore=("*.extra.*",)))


def test_what_cannot_be_done_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = encoders.resolve("hf:somewhere")
    assert encoders.implied_options("hf:some/where") == {"folder": "some/where"}
    with pytest.raises(ValueError, match="needs a folder"):
        cls.check(ForeignOptions(), 1)
    with pytest.raises(ValueError, match=r"no config\.json"):
        cls.check(ForeignOptions(folder=str(tmp_path)), 1)
    path = folder("Wav2Vec2Model", tmp_path / "made")
    cfg = ForeignOptions(folder=str(path))
    with pytest.raises(ValueError, match="a clip of no samples"):
        cls.rows(cfg, {"samples": 0, "rate": 16000})
    with pytest.raises(ValueError, match="cannot take input_values of shape"):
        cls.rows(cfg, {"samples": 9, "rate": 16000})
    with pytest.raises(ValueError, match="has no part 'no'; it has feature_extractor"):
        cls.rows(ForeignOptions(folder=str(path), part="no"), {"samples": 9000, "rate": 16000})
    with pytest.raises(ValueError, match="it has no output pooled"):
        cls.rows(ForeignOptions(folder=str(path), output="pooled"), {"samples": 9000, "rate": 16000})
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has processors of nothing in"):
        cls.check(ForeignOptions(folder=str(path), seconds=29.0), 1)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        foreign.package()


def test_parts_outputs_and_leading_rows_are_options(tmp_path: Path) -> None:
    path = folder("CLIPModel", tmp_path / "made")
    given = items(True)[:1]
    whole = ForeignOptions(folder=str(path))
    part = ForeignOptions(folder=str(path), part="vision_model", drop=1)
    a, b = made(whole)(batch(whole, given)), made(part)(batch(part, given))
    assert b.rows == (16,) and torch.equal(a.values[1:], b.values)
    short = ForeignOptions(folder=str(folder("Wav2Vec2Model", tmp_path / "speech")), seconds=0.5)
    cls = encoders.resolve("hf:")
    meta = {"samples": 80000, "rate": 8000}
    assert cls.rows(short, meta) == cls.rows(short, {"samples": 8000, "rate": 16000})
    assert cls.prepare(short, wav(80000), meta).numel() == 8000
