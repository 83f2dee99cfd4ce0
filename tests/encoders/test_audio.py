"""Published audio encoders equal transformers': features and gradients, inputs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import encoders
from encoders.audio.sound import Sound, mel_filters
from encoders.compat import resample
from encoders.hf import load_hf
from encoders.media.decode import read_sound
from tests.encoders.helpers import wav
from tests.encoders.speech import FAMILIES, encoder_of, extractor, folder, model


def inputs_of(made: Any, seed: int) -> dict[str, Tensor]:
    """Random inputs of two clips, of unequal lengths where the family allows."""
    cfg, gen = encoder_of(made).config, torch.Generator().manual_seed(seed)
    if hasattr(cfg, "max_source_positions"):
        frames = 2 * cfg.max_source_positions
        found = {"input_features": torch.randn(2, cfg.num_mel_bins, frames, generator=gen)}
        if cfg.model_type == "audioflamingo3_encoder":
            lengths = torch.tensor([[frames - seed % 3], [7 + seed % 9]])
            found["input_features_mask"] = (torch.arange(frames)[None] < lengths).int()
        return found
    if hasattr(cfg, "conv_dim"):
        return {"input_values": torch.randn(2, 700, generator=gen)}
    lengths = torch.tensor([37 + seed % 30, 5 + seed % 9])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    frames = torch.randn(*mask.shape, 16, generator=gen) * mask[..., None]
    return {"input_features": frames, "attention_mask": mask}


def real_rows(found: Tensor, expected: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of both that are of a clip."""
    states = expected.last_hidden_state
    if "input_features_mask" in inputs:
        rows = ((inputs["input_features_mask"].sum(-1) - 1) // 2 + 1) // 2
    elif "attention_mask" in inputs:
        rows = -(-inputs["attention_mask"].sum(-1) // 8)
    else:
        return found.flatten(0, 1), states.flatten(0, 1)
    mask = torch.arange(found.shape[1])[None] < rows[:, None]
    return found[mask], states[:, : found.shape[1]][mask]


def weigh(x: Tensor) -> Tensor:
    """A scalar in which every number counts differently."""
    return (x.flatten() * torch.cos(torch.arange(x.numel(), dtype=x.dtype))).sum()


def compare(family: str, seed: int, path: Path, dtype: torch.dtype, tolerance: float) -> None:
    made = model(family, seed)
    net = load_hf(folder(made, path), dtype)
    theirs = encoder_of(made.to(dtype))
    inputs = inputs_of(made, seed)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    ours, expected = real_rows(net.features(inputs), theirs(**inputs), inputs)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    weigh(ours).backward()
    weigh(expected).backward()
    grads = {k: p.grad for k, p in net.encoder.named_parameters()}
    size = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    # The norm of all gradients, and each of a few that are easy to find by their values.
    for ours_name, theirs_name in PAIRS[family.partition("_")[0]].items():
        a, b = grads[ours_name], theirs.get_parameter(theirs_name).grad
        assert a is not None
        assert float((a.flatten() - b.flatten()).abs().max()) <= 10 * tolerance * max(1.0, size), ours_name
    total = sum(float(g.double().square().sum()) for g in grads.values() if g is not None)
    wanted = sum(float(p.grad.double().square().sum()) for p in theirs.parameters() if p.grad is not None)
    frozen = [k for k, g in grads.items() if g is None]
    if "position" in grads:  # ours has gradients of positions, which theirs are fixed
        total -= float(grads["position"].double().square().sum())
    assert not frozen and total == pytest.approx(wanted, rel=100 * tolerance)


PAIRS = {
    "whisper": {"conv1": "conv1.weight", "blocks.0.attention.k": "layers.0.self_attn.k_proj.weight"},
    "wav2vec2": {
        "conv0": "feature_extractor.conv_layers.0.conv.weight",
        "near": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        "near_length": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    },
    "parakeet": {
        "subsample.conv": "subsampling.layers.0.weight",
        "blocks.0.attention.distance": "layers.0.self_attn.relative_k_proj.weight",
        "blocks.0.attention.to_distance": "layers.0.self_attn.bias_v",
        "blocks.0.convolution.scale": "layers.0.conv.norm.weight",
    },
}
PAIRS["hubert"], PAIRS["audioflamingo3"] = PAIRS["wav2vec2"], PAIRS["whisper"]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    compare(family, 0, tmp_path / "a", torch.float64, 1e-10)
    compare(family, 1, tmp_path / "b", torch.float32, 1e-5 if "parakeet" not in family else 5e-5)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), seed=st.integers(2, 10**6))
def test_random_configs_are_exact(family: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    compare(family, seed, tmp_path_factory.mktemp("made") / "x", torch.float64, 1e-10)


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_inputs_are_those_of_the_feature_extractor(family: str, tmp_path: Path) -> None:
    """Of clips of several rates and lengths, also of some that are cut."""
    made = model(family, 3)
    net, theirs = load_hf(folder(made, tmp_path / "made")), extractor(made)
    cls, cfg = type(net.encoder), net.encoder.cfg
    for samples, rate in [(9000, 16000), (4001, 8000), (30011, 44100), (20000, 8000), (1600, 48000)]:
        payload, meta = wav(samples, rate, 2), {"samples": samples, "rate": rate}
        x = resample(*read_sound(payload), 16000)[: int(cfg.sound.seconds * 16000)]
        expected = theirs(np.asarray(x), sampling_rate=16000, return_tensors="pt")
        (values,) = [v[0] for k, v in expected.items() if k != "attention_mask"]
        if family in ("whisper", "audioflamingo3"):
            values = values.T
        if "attention_mask" in expected:
            values = values[: int(expected["attention_mask"].sum())]
        found = cls.prepare(cfg, payload, meta)
        assert len(found) == cls.input_count(cfg, meta)
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
        features = net.encoder(
            encoders.pack_items(cls, cfg, [found], [meta], device="cpu", dtype=torch.float32)
        )
        assert features.rows == (cls.rows(cfg, meta),) == (len(features.values),)


def test_filters_are_those_of_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank

    for bins, mels, top in ((201, 80, 8000.0), (201, 128, 8000.0), (257, 128, 8000.0)):
        theirs = mel_filter_bank(bins, mels, 0.0, top, 16000, norm="slaney", mel_scale="slaney")
        torch.testing.assert_close(
            mel_filters(bins, mels, 16000, top).double(), torch.from_numpy(theirs), rtol=1e-5, atol=1e-9
        )


def test_a_clip_that_cannot_be_heard_is_refused_in_words() -> None:
    for name, few in (("whisper", 0), ("wav2vec2", 9), ("parakeet", 319)):
        cls = encoders.resolve(name)
        with pytest.raises(ValueError, match=r"zero samples.*needed: at least one"):
            cls.rows(cls.Config(), {"samples": 0, "rate": 16000})
        if few:
            with pytest.raises(ValueError, match=f"a clip of {few} samples at 16000.*needed: at least"):
                cls.rows(cls.Config(), {"samples": few, "rate": 16000})
        cls.check(cls.Config(), 1)
        assert cls.rows(cls.Config(), {"samples": 10**7, "rate": 8000}) == cls.rows(
            cls.Config(), {"samples": int(Sound().seconds * 16000), "rate": 16000}
        )


def test_tensors_that_are_missing_and_switches_that_are_not_here_are_named(tmp_path: Path) -> None:
    path = folder(model("wav2vec2", 0), tmp_path / "made")
    tensors = load_file(path / "model.safetensors")
    (old,) = [k for k in tensors if k.endswith("original0")]
    renamed = {
        k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in tensors.items()
    }
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(dict(load_hf(path).encoder.named_parameters())["near_length"], tensors[old])
    gone = {k: v for k, v in tensors.items() if k != old}
    save_file(gone, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: encoder\.pos_conv_embed\.conv\.weight_g"):
        load_hf(path)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"add_adapter": false', '"add_adapter": true'))
    with pytest.raises(ValueError, match="add_adapter=True; needed: False"):
        load_hf(path)
