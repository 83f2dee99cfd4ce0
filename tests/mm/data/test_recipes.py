"""The recipes of docs/data_recipes.md, on miniatures in the formats that users get."""

from __future__ import annotations

import io
import wave

import numpy as np


def tone(samples: int, rate: int = 8000) -> bytes:
    """A tone as 16-bit wav."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((8000 * np.sin(np.arange(samples) / 4)).astype("<i2").tobytes())
    return buffer.getvalue()
