"""The hybrid Mamba-2, attention and mixture-of-experts language model.

Encoder rows enter it as tensors, in the place of token embeddings. Encoders and jobs may not enter this room.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llm.hf import CausalLM

__all__ = ["load_hf"]


def load_hf(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> CausalLM:
    """A published model: see llm.hf.load_hf."""
    # Imported here because llm.config is pure and used where torch is not.
    from llm import hf

    return hf.load_hf(path, dtype, device)
