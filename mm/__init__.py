"""Multimodal jobs: configs, data, plans, ranks, training and the command line.

It is an application. Nothing below may import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mm.inference.whole import WholeModel

__all__ = ["load"]


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> WholeModel:
    """A whole trained model for a notebook: see mm.inference.whole.load_whole."""
    # Imported here because the command line answers without torch.
    from mm.inference import whole

    return whole.load_whole(path, dtype, device)
