"""Probes: functions that read a payload's metadata (sizes), by file extension."""

from __future__ import annotations

import hashlib
import inspect
import io
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Probe = Callable[[bytes], dict[str, Any]]


def _probe_media(payload: bytes) -> dict[str, Any]:
    """By the payload's content: its extension only says that it is media. Version 1."""
    from encoders.media.probe import probe_media

    return probe_media(payload)


def _probe_npy(payload: bytes) -> dict[str, int]:
    array = np.load(io.BytesIO(payload), allow_pickle=False)
    return {f"dim{i}": n for i, n in enumerate(array.shape)}


PICTURES = ("png", "jpg", "jpeg", "bmp", "tif", "tiff", "avif", "gif", "webp")
SOUNDS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a")
VIDEOS = ("tar", "mp4", "m4v", "mov", "mkv", "webm", "avi")
_probes: dict[str, Probe] = dict.fromkeys(PICTURES + SOUNDS + VIDEOS, _probe_media)
_probes["npy"] = _probe_npy


def register_probe(extension: str, probe: Probe) -> None:
    """Register the probe that reads the metadata of payloads with an extension (without dot)."""
    _probes[extension.lower()] = probe


def metadata(extension: str, payload: bytes) -> dict[str, Any]:
    """What the extension's probe reads from a payload, as plain numbers; empty where there is no probe.

    Raises whatever the probe raises for a payload that it cannot read.
    """
    if extension not in _probes:
        return {}
    found = _probes[extension](payload)
    return {k: v if isinstance(v, float) else operator.index(v) for k, v in found.items()}


@lru_cache
def _identity(probe: Probe) -> str:
    """A probe's name and a hash of its source: an index that another probe has made differs in it."""
    named = probe if hasattr(probe, "__qualname__") else type(probe)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):  # no source file, or not written in Python: the name must suffice
        source = ""
    return f"{named.__module__}.{named.__qualname__} {hashlib.sha256(source.encode()).hexdigest()[:12]}"


def known(extension: str) -> str | None:
    """The identity of an extension's probe, None where there is none."""
    return _identity(_probes[extension]) if extension in _probes else None
