"""Imports of torchvision and torchaudio that also work with a CPU build of torch; resampling, mel frames.

The wheels of both packages are built for CUDA. With a CPU torch their native parts do not load and their
imports fail, although everything used here is plain Python. So each is imported when it is first needed. If
that fails, its missing native part is declared absent and the import is tried once more. If that fails too, a
small implementation of our own takes over. A working install is never changed.

Packages that plug-ins import need the same repair (transformers imports torchvision): repair() runs before
any code of others is imported.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from functools import cache

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
