"""Imports of torchvision and torchaudio that also work with a CPU build of torch; pictures and sound.

The wheels of both packages are built for CUDA. With a CPU torch their native parts do not load and their
imports fail, although everything used here is plain Python. So each is imported when it is first needed. If
that fails, its missing native part is declared absent and the import is tried once more. If that fails too, a
small implementation of our own takes over. A working install is never changed.

Packages that plug-ins import need the same repair (transformers imports torchvision): repair() runs before
any code of others is imported.
"""

from __future__ import annotations

import importlib
import io
import math
import sys
import types
import wave
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@cache
def torchvision() -> tuple[types.ModuleType | None, str]:
    """(the module or None, the path that was taken: native, shimmed or fallback with the reason)."""
    return _import("torchvision", _declare_torchvision_ops)


@cache
def torchaudio() -> tuple[types.ModuleType | None, str]:
    """(the module or None, the path that was taken: native, shimmed or fallback with the reason)."""
    return _import("torchaudio", _stub_torchaudio_extension)


def repair() -> None:
    """Import both, so that other packages that import them find them whole. Call it before these packages are
    imported."""
    status()


def status() -> dict[str, str]:
    """The path that was taken for each package, for people to read."""
    return {"torchvision": torchvision()[1], "torchaudio": torchaudio()[1]}


def _import(name: str, shim: Callable[[], None]) -> tuple[types.ModuleType | None, str]:
    try:
        return importlib.import_module(name), "native"
    except (ImportError, OSError, RuntimeError) as error:
        first = error
    for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[loaded]
    if isinstance(first, ModuleNotFoundError) and first.name == name:
        return None, f"fallback: {name} is not installed"
    try:
        shim()
        return importlib.import_module(
            name
        ), f"shimmed (native part absent: {str(first).splitlines()[0][:70]})"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"fallback: {str(error).splitlines()[0][:90]}"


# Kept for the life of the process: the operators of a library vanish when it is garbage-collected.
_libraries: list[torch.library.Library] = []


def _declare_torchvision_ops() -> None:
    # torch.library has no annotations.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for op in ("nms", "qnms"):
        schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    _libraries.append(library)


def _stub_torchaudio_extension() -> None:
    stub = types.ModuleType("torchaudio._extension")
    stub.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=lambda fn: fn,
    )
    sys.modules["torchaudio._extension"] = stub


def picture_channels(image: Any) -> int:
    """Channels of an opened PIL image: 1 (grey, also as a palette or with alpha) or 3 (colour)."""
    if image.mode in ("P", "PA"):
        shades = image.getpalette("RGB")
        return 1 if shades[0::3] == shades[1::3] == shades[2::3] else 3
    return 1 if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;") else 3


def check_channels(held: int, channels: int) -> None:
    """Raise ValueError where a picture has more channels (`held`) than an encoder takes (`channels`): its
    colours would be lost. A grey picture fits an encoder for colour: its three channels are equal."""
    if held > channels:
        raise ValueError(
            f"a colour picture, of {held} channels (RGB), where the option channels is {channels} (grey), so "
            f"that its colours would be lost; needed: channels={held}, which takes grey pictures too, or "
            "pictures saved in grey"
        )


def decode_image(payload: bytes, channels: int) -> Tensor:
    """PNG or JPEG bytes to uint8 [channels, height, width]; channels: 1 (grey) or 3 (RGB).

    A grey picture may become RGB; for the reverse it raises ValueError. Of 16 bits the upper 8 are taken.
    """
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(payload))
    check_channels(picture_channels(image), channels)
    if image.mode.startswith("I;16"):  # convert() would clip all above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    module, _ = torchvision()
    if module is not None:
        transforms = importlib.import_module("torchvision.transforms.v2.functional")
        planes: Tensor = transforms.pil_to_tensor(image)
        return planes
    return image_tensor(np.asarray(image))


def image_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [height, width] or [height, width, channels] to uint8 [channels, height, width]."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(planes, order="C"))  # a copy: decoded pixels are read-only


def read_wav(payload: bytes) -> tuple[Tensor, int]:
    """PCM wav (8 bit unsigned, 16 or 32 bit signed) to mono float32 samples [n] in [-1, 1], and samples a
    second. Raises ValueError for other widths."""
    with wave.open(io.BytesIO(payload)) as f:
        width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
        raw = f.readframes(f.getnframes())
    kinds: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
    if width not in kinds:
        raise ValueError(f"wav with {8 * width}-bit samples; needed: 8, 16 or 32 bit PCM")
    samples = np.frombuffer(raw, kinds[width]).astype(np.float32)
    samples = (samples - 128.0) / 128.0 if width == 1 else samples / float(1 << (8 * width - 1))
    return torch.from_numpy(samples.reshape(-1, channels).mean(axis=1)), rate


def resample(samples: Tensor, given: int, wanted: int) -> Tensor:
    """Samples [n] at `given` a second to [ceil(n wanted / given)] at `wanted` a second, band-limited as
    torchaudio does it. Raises ValueError where that is not installed and the rates differ."""
    if given == wanted:
        return samples
    module, path = torchaudio()
    if module is None:
        raise ValueError(
            f"a clip of {given} samples a second is resampled to {wanted} by torchaudio, which is missing "
            f"({path}); needed: torchaudio, or clips of {wanted} samples a second"
        )
    out: Tensor = module.functional.resample(samples, given, wanted)
    return out


@cache
def mel_filters(bins: int, mels: int, rate: int) -> Tensor:
    """Triangular mel filters (HTK scale, no normalisation) from 0 to rate / 2 Hz: float32 [bins, mels]."""
    module, _ = torchaudio()
    if module is not None:
        filters: Tensor = module.functional.melscale_fbanks(bins, 0.0, rate / 2, mels, rate)
        return filters
    return own_mel_filters(bins, mels, rate)


def own_mel_filters(bins: int, mels: int, rate: int) -> Tensor:
    """mel_filters() without torchaudio; a test holds the two equal."""
    frequency = torch.linspace(0, rate // 2, bins)
    top = 2595.0 * math.log10(1.0 + rate / 2 / 700.0)
    points = 700.0 * (10.0 ** (torch.linspace(0.0, top, mels + 2) / 2595.0) - 1.0)
    width = points[1:] - points[:-1]
    slope = points.unsqueeze(0) - frequency.unsqueeze(1)  # [bins, mels + 2]
    rising, falling = -slope[:, :-2] / width[:-1], slope[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(samples: Tensor, *, rate: int, mels: int, window: int, hop: int) -> Tensor:
    """Log-mel frames [n // hop + 1, mels] of mono samples [n], n >= 1, at `rate` samples a second. window and
    hop are in samples.

    The power spectrogram is that of torchaudio's MelSpectrogram: torch.stft with centred frames.
    """
    size = 1 << (window - 1).bit_length()
    short = max(0, size // 2 + 1 - samples.shape[0])  # reflection needs more samples than it mirrors
    padded = torch.nn.functional.pad(samples, (0, short))
    spectrum = torch.stft(
        padded,
        size,
        hop,
        window,
        torch.hann_window(window, dtype=samples.dtype),
        center=True,
        return_complex=True,
    )
    power = spectrum.abs().square()[:, : samples.shape[0] // hop + 1]
    filters = mel_filters(size // 2 + 1, mels, rate).to(samples.dtype)
    return (power.T @ filters + 1e-6).log()
