"""A language model with the usual interface: token ids in, logits out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from llm.hf.config import read_config
from llm.hf.weights import check_folder
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from parallel.published import SafeFolder, allocate, read_into, stored_dtypes
from parallel.sequence.packed import Packing
from parallel.tensor_parallel.loss import logits


class CausalLM(nn.Module):
    """An LLM in one process whose forward returns logits. model: the LLM; train it as any other."""

    def __init__(self, model: LLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, packing: Packing | None = None) -> Tensor:
        """Logits [batch, length, vocab] of ids [batch, length], float32 (float64 for a float64 model).

        packing: the documents that the batch * length tokens consist of, in order; None: each sequence is
        one. No document attends to another.
        """
        batch, length = input_ids.shape
        ids, count = input_ids.reshape(-1), batch * length
        packing = packing or Packing.of([length] * batch, input_ids.device)
        text = LLMBatch(ids, ids, packing, count, {})
        cfg, states = self.model.cfg, self.model.states(text, {}, ForwardContext(packing, count))
        x = logits(states, self.model.head_weight(), cfg.logit_scale, cfg.logit_cap)
        return x.view(batch, length, -1)


def load_hf(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> CausalLM:
    """A published model from a folder with config.json and *.safetensors, in one process.

    dtype: of all weights, None for that of each tensor in the files; the routing bias is float32 at least.
    Raises ValueError where the family is not known (llm.hf.families), where the config describes a model that
    ours cannot be, and where tensors are missing, unknown or of another shape. For a sharded model see
    load_weights().
    """
    folder = SafeFolder(path)
    cfg = read_config(folder.config())
    tensors, view = check_folder(cfg, folder)
    stored = stored_dtypes(tensors, view)
    model = LLM(cfg, device="meta")
    allocate(model, {name: dtype or stored[name] for name in stored}, device)
    read_into(model, tensors, view)
    return CausalLM(model)
